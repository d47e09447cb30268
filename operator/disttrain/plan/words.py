"""The sentences about a pod that failed: which one, how, its termination message, and where its log is. No decisions."""

import re
import signal
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType

from disttrain.api.names import TRAINER_CONTAINER, Role
from disttrain.api.reasons import Reason
from disttrain.api.status import LastRestart
from disttrain.plan.model import DISRUPTED, PodView
from disttrain.plan.view import JobView

WARNING = "Warning: "
"""In the message of a condition, before what a user has to know of a job in which nothing failed."""
_LONGEST = 1024
"""Characters of a termination message in a sentence; the whole text is in the pod's log."""
_OUT_OF_MEMORY = "OOMKilled"
HOW_LOST: Mapping[Reason, str] = MappingProxyType(
    {
        Reason.REPLACED: "was deleted",
        Reason.PREEMPTED: "was preempted",
        Reason.EVICTED: "was evicted from its node",
        Reason.NODE_LOST: "was deleted because its node is lost",
    }
)
"""How a pod was taken away, by the reason."""
_NODE_LOST = frozenset({"DeletionByTaintManager", "DeletionByPodGC"})
_EVICTED = frozenset({"EvictionByEvictionAPI", "TerminationByKubelet"})
_KILLED = frozenset(
    128 + number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
)
"""Exit codes of processes that ended by a signal that a program cannot handle, or does not expect."""
_SAID_BY_OURS = ("the script was killed", "the process was killed")
"""How the agent of a script and the launcher of a pod begin, when they say that their process was killed."""
_CLOCK = re.compile(r"\s*\(\d+ s\)")


def failure(view: JobView, pod: PodView) -> str:
    """Why a pod failed, in a sentence that can stand in a condition, an Event, or on a terminal."""
    how = [pod.reason] if pod.reason and pod.reason != "Error" else []
    if pod.exit_code is not None:
        how.append(f"exit code {pod.exit_code}")
    if pod.reason == _OUT_OF_MEMORY and (limit := _memory_limit(view, pod.role)):
        how.append(f"memory limit {limit}")
    text = f"Pod {pod.name} failed" + (f" ({', '.join(how)})" if how else "")
    if words := termination_message(pod):
        text += f": {words}"
    hint = view.snapshot.log_hint.format(namespace=view.job.metadata.namespace, pod=pod.name)
    return f"{text}; log: {hint}"


def termination_message(pod: PodView) -> str:
    """What the container said last, else what Kubernetes says of the pod."""
    words = pod.termination.message or pod.message
    if pod.termination.message and pod.exit_code in _KILLED and not words.startswith(_SAID_BY_OURS):
        words = f"last output: {words}"  # a killed process leaves no message: this is the end of its log, and no reason
    if pod.termination.message and pod.termination.where:
        words = f"{words} ({pod.termination.where})"
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}…"


def last_restart(pod: PodView, *, finished: datetime) -> LastRestart:
    """The failure of a pod as the status keeps it."""
    return LastRestart(
        role=pod.role.status_name,
        index=pod.index,
        reason=(pod.reason or "Error")[:253],
        exit_code=pod.exit_code,
        message=termination_message(pod),
        time=finished.replace(microsecond=0),
    )


def disruption(pod: PodView) -> Reason:
    """Why a pod was taken away: by whom its DisruptionTarget says that it was."""
    if pod.silent_since is not None or pod.disruption in _NODE_LOST:
        return Reason.NODE_LOST
    if pod.disruption in _EVICTED:
        return Reason.EVICTED
    return Reason.PREEMPTED if DISRUPTED in pod.conditions else Reason.REPLACED


def node_lost(pod: PodView) -> str:
    """What is said of a pod whose node does not report."""
    since = f" since {pod.silent_since:%H:%M:%S} UTC" if pod.silent_since is not None else ""
    return f"Node {pod.node} of pod {pod.name} does not report{since}; the operator creates the pod again when Kubernetes has deleted it"


def without_clock(text: str) -> str:
    """A master's words without the running seconds: they would make every pass a change of the status."""
    return _CLOCK.sub("", text)


def count(number: int, role: Role) -> str:
    """Such as "2 workers"."""
    name = {Role.MASTER: "master", Role.PARAMETER_SERVER: "parameter server", Role.WORKER: "worker"}[role]
    return f"{number} {name}{'' if number == 1 else 's'}"


def _memory_limit(view: JobView, role: Role) -> str:
    """What the role's template allows the trainer container, "" for no limit."""
    for container in view.spec.template_of(role).containers:
        if container.name == TRAINER_CONTAINER and container.resources is not None:
            return str((container.resources.limits or {}).get("memory", ""))
    return ""
