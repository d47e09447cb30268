"""What decisions need of a pod: its body reduced to a PodView. Reasons and messages of Kubernetes are read here, and nowhere else.

Not here: what they mean for the job (`disttrain.plan`).
"""

import logging
import re
from datetime import datetime, timedelta

from disttrain.api import Termination
from disttrain.api.names import (
    ANNOTATION_TRAINER_IMAGE,
    LABEL_ATTEMPT,
    LABEL_INDEX,
    LABEL_JOB_NAME,
    LABEL_ROLE,
    TRAINER_CONTAINER,
    Role,
    pod_name,
)
from disttrain.kube.api import Body
from disttrain.plan.model import DISRUPTED, Phase, PodView, Trouble
from disttrain.plan.view import REPORT_TIMEOUT

log = logging.getLogger(__name__)

LONGEST = 4096
"""Characters of a message that are kept, as many as a kubelet takes of a termination message. A user who may write the status of a pod
may write more, and one process keeps those of all namespaces."""
CRASH_FORGOTTEN_AFTER = timedelta(minutes=10)
"""After so long the kubelet itself takes a container that failed for one that is well."""
_ON_ITS_WAY = frozenset({"PodInitializing", "ContainerCreating"})
_NOT_STARTED = frozenset({"StartError", "ContainerCannotRun"})
_WORDS_OF_NOT_STARTED = (
    (re.compile(r"(?<![\w/])exec:? .*(executable file not found|no such file or directory)"), 127),
    (re.compile(r"(?<![\w/])exec:? .*permission denied"), 126),
)
_TROUBLE_OF_THE_NODE = re.compile(r"unable to retrieve OCI runtime error|hook")
"""A runtime or a hook that is not there is no mistake of the job: another node may have it."""


def project_pod(body: Body) -> PodView | None:
    """The PodView of a pod's body, or of its metadata alone when it was just made; None when it has not the labels that the
    operator gave it: one with another place's labels would be counted there, and its own place never be filled.

    A status that cannot be read counts as none: the pod of one tenant must not stop the reading of all the others.
    """
    metadata, spec = body["metadata"], body.get("spec", {})
    try:
        return _project(metadata, spec, body.get("status", {}))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        name = f"{metadata['namespace']}/{metadata['name']}"
        log.warning(
            "cannot read the status of pod %s, which counts as empty: %s: %s", name, type(error).__name__, error
        )
        return _project(metadata, {}, {})


def _project(metadata: Body, spec: Body, status: Body) -> PodView | None:
    labels = metadata.get("labels", {})
    try:
        role, index, attempt = Role(labels[LABEL_ROLE]), int(labels[LABEL_INDEX]), int(labels[LABEL_ATTEMPT])
        if metadata["name"] != pod_name(labels[LABEL_JOB_NAME], role, index):
            return None
    except (KeyError, ValueError):
        return None
    conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
    true = frozenset(type_ for type_, condition in conditions.items() if condition["status"] == "True")
    state = _trainer(status).get("state", {})
    phase, trainer = _phase(status, state, disrupted=DISRUPTED in true), state.get("terminated", {})
    init, failed = _failed_init_container(spec, status) if phase is Phase.FAILED and not trainer else ("", {})
    ended = trainer or failed
    reason, message = _why(status, ended, _init_words(init, failed), conditions)
    silent_since = _silent_since(spec, conditions) if phase is Phase.RUNNING else None
    finished = ended.get("finishedAt") or (_last_transition(conditions) if phase is Phase.FAILED else None)
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        role=role,
        index=index,
        attempt=attempt,
        phase=phase,
        created=_time(metadata["creationTimestamp"]),
        ready=silent_since is None and bool(_trainer(status).get("ready", "Ready" in true)),
        ready_since=_ready_since(state, conditions),
        scheduled="PodScheduled" in true or bool(spec.get("nodeName")),
        deleting="deletionTimestamp" in metadata,
        deletion_deadline=_time(metadata["deletionTimestamp"]) if "deletionTimestamp" in metadata else None,
        finished=_time(finished) if finished else None,
        exit_code=_exit_code(trainer),  # the rules of a failure policy are about the trainer's
        reason=reason[:LONGEST],
        message=message[:LONGEST],
        termination=Termination.decode(trainer["message"][:LONGEST]) if trainer.get("message") else Termination(),
        conditions=true,
        disruption=conditions[DISRUPTED].get("reason", "") if DISRUPTED in true else "",
        node=spec.get("nodeName", ""),
        silent_since=silent_since,
        trainer_image=(metadata.get("annotations") or {}).get(ANNOTATION_TRAINER_IMAGE, ""),
        trouble=_trouble(status) if phase in (Phase.PENDING, Phase.RUNNING) else None,
    )


def _trainer(status: Body) -> Body:
    for container in status.get("containerStatuses", ()):
        if container["name"] == TRAINER_CONTAINER:
            found: Body = container
            return found
    return {}


def _phase(status: Body, trainer: Body, *, disrupted: bool) -> Phase:
    """The pod's phase, as far as it is the trainer's. A pod waits for every container's start, and fails with any that fails."""
    phase = Phase(status.get("phase", Phase.PENDING))
    if phase is Phase.PENDING and "running" in trainer:
        return Phase.RUNNING
    # The kubelet itself ended it (evicted, node shut down): then an exit code of 0 means that the program obeyed, not that it was done.
    by_the_kubelet = disrupted or bool(status.get("reason"))
    if phase is Phase.FAILED and trainer.get("terminated", {}).get("exitCode") == 0 and not by_the_kubelet:
        return Phase.SUCCEEDED
    return phase


def _silent_since(spec: Body, conditions: dict[str, Body]) -> datetime | None:
    """Since when the pod's node has not reported. A kubelet says of a pod whose containers are ready, and whose readiness gates are open,
    that it is ready; only the node controller takes that away, when the kubelet does not report."""
    if conditions.get("Ready", {}).get("status") == "True":
        return None
    needed = ("ContainersReady", *(gate["conditionType"] for gate in spec.get("readinessGates") or ()))
    if "Ready" in conditions and all(conditions.get(type_, {}).get("status") == "True" for type_ in needed):
        return _since(conditions["Ready"])
    return None


def _ready_since(trainer: Body, conditions: dict[str, Body]) -> datetime | None:
    """When the pod became ready; of one whose other containers are not, when the trainer began."""
    if conditions.get("Ready", {}).get("status") == "True":
        return _since(conditions["Ready"])
    started = trainer.get("running", {}).get("startedAt")
    return _time(started) if started else None


def _trouble(status: Body) -> Trouble | None:
    """The first container beside the trainer that fails, cannot start, or never becomes ready."""
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        if container["name"] != TRAINER_CONTAINER and (trouble := _trouble_of(container)) is not None:
            return trouble
    return None


def _trouble_of(container: Body) -> Trouble | None:
    name, state = container["name"], container.get("state", {})
    waiting, ended = (
        state.get("waiting", {}),
        state.get("terminated") or container.get("lastState", {}).get("terminated", {}),
    )
    if waiting.get("reason", "PodInitializing") not in (*_ON_ITS_WAY, "CrashLoopBackOff"):
        return Trouble(
            container=name, words=f"{waiting['reason']}: {waiting.get('message', '')}".removesuffix(": ")[:LONGEST]
        )
    if ended.get("exitCode"):
        # The words are those of every try, so that a container that fails again and again is not news each time.
        reason = f" ({ended['reason']})" if ended.get("reason") not in (None, "", "Error") else ""
        running = "running" in state and ended.get("finishedAt")
        until = _time(ended["finishedAt"]) + CRASH_FORGOTTEN_AFTER if running else None
        return Trouble(container=name, words=f"failed with exit code {ended['exitCode']}{reason}", until=until)
    if waiting.get("reason") == "CrashLoopBackOff":
        return Trouble(container=name, words="keeps ending")
    if (since := state.get("running", {}).get("startedAt")) and not container.get("ready"):
        return Trouble(container=name, words="runs, but does not become ready", since=_time(since) + REPORT_TIMEOUT)
    return None


def _failed_init_container(spec: Body, status: Body) -> tuple[str, Body]:
    """The init container that failed the pod, and how it ended. A sidecar cannot: its exit code only says that it was asked to end."""
    sidecars = {one["name"] for one in spec.get("initContainers", ()) if one.get("restartPolicy") == "Always"}
    for container in status.get("initContainerStatuses", ()):
        ended: Body = container.get("state", {}).get("terminated", {})
        if ended.get("exitCode") and container["name"] not in sidecars:
            return container["name"], ended
    return "", {}


def _init_words(name: str, ended: Body) -> str:
    """How it ended and its last message: users look at the trainer's log first, and the trainer never ran."""
    if not name:
        return ""
    reason = f"{ended['reason']}, " if ended.get("reason") not in (None, "Error") else ""
    words = ended.get("message") or f"see its log with -c {name}"
    return f"init container {name} ({reason}exit code {ended['exitCode']}): {words}"


def _exit_code(ended: Body) -> int | None:
    """The container's. A runtime says 128 when it could not start the program; why, as a shell's 126 and 127 have it, is in its words."""
    message = ended.get("message", "")
    if ended.get("reason") in _NOT_STARTED and not _TROUBLE_OF_THE_NODE.search(message):
        for words, meaning in _WORDS_OF_NOT_STARTED:
            if words.search(message):
                return meaning
    code: int | None = ended.get("exitCode")
    return code


def _why(status: Body, ended: Body, words: str, conditions: dict[str, Body]) -> tuple[str, str]:
    """Why the pod failed or waits. The pod's own reason (Evicted) says more than its container's (Error)."""
    if status.get("reason"):
        return status["reason"], status.get("message", "")
    if ended:
        return "Error" if words else ended.get("reason", ""), words
    if waits := _waiting(status):
        return waits
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return scheduled.get("reason", ""), scheduled.get("message", "")
    return "", ""


def _waiting(status: Body) -> tuple[str, str] | None:
    """What the pod waits for: the container that cannot start, and of no such one the first that has yet to."""
    if "running" in _trainer(status).get("state", {}):
        return None
    found = None
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        if waiting := container.get("state", {}).get("waiting"):
            reason, message = waiting.get("reason", ""), waiting.get("message", "")
            if reason in _ON_ITS_WAY:
                found = found or (reason, message)
                continue
            own = container["name"] == TRAINER_CONTAINER
            return reason, message if own else f"container {container['name']}: {message or reason}"
    return found


def _since(condition: Body) -> datetime | None:
    moment = condition.get("lastTransitionTime")
    return _time(moment) if moment else None


def _last_transition(conditions: dict[str, Body]) -> str | None:
    return max((c["lastTransitionTime"] for c in conditions.values() if c.get("lastTransitionTime")), default=None)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
