"""Which failure is the cause of the others, and whether an exit code says anything about the user's code.

Our own loop knows when it lost a peer, and ends with exit code 75. A user's program does not: when a peer's node is lost, it sees a broken
connection and ends with exit code 1 like most programs, long before Kubernetes marks the node as lost.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from enum import Enum, auto

from disttrain.api.names import Role
from disttrain.api.reasons import ConditionType
from disttrain.plan.failures.account import finished
from disttrain.plan.model import DISRUPTED, PodView
from disttrain.plan.view import JobView, Slot

NODE_LOSS_SHOWS_WITHIN = timedelta(seconds=60)
"""Kubernetes marks a node that does not report after 40 to 50 s. Only after that an exit code may fail the job."""


class Verdict(Enum):
    """What an exit code of a program of the user's is taken for."""

    CAUSE = auto()
    CONSEQUENCE = auto()
    """A peer was taken away, its node is silent, or it has no node: that is the program's trouble, and no fault of the job."""
    UNSURE = auto()
    """A peer is not ready, and it is not known why: the failure counts, and does not fail the job."""
    OPEN = auto()
    """A peer's node may be lost without having been missed yet."""


def root_cause(view: JobView, fresh: list[PodView]) -> PodView | None:
    """The pod that failed first, None when all of them are consequences of a failure that is written down or of no pod's."""
    causes = [pod for pod in fresh if not view.lost_its_peers(pod)]
    if not causes:
        return None

    def rank(pod: PodView) -> tuple[bool, datetime, bool, str, int]:
        # Clocks of nodes differ by seconds, and so does the second of two ends: a signal (OOM, SIGKILL) or a disruption is the cause, and
        # an exit code its consequence. Of our own loop only within a second: there an exit code is an error that was looked at.
        says_little = says_little_by_itself(view, pod)
        return says_little, finished(view, pod), 0 < (pod.exit_code or 0) < 128, pod.role.value, pod.index

    root = min(causes, key=rank)
    earlier = recorded_cause(view)
    if earlier is None:
        return root
    last = view.restarts.last
    by_a_signal = last is not None and not 0 < (last.exit_code or 0) < 128
    return None if earlier <= finished(view, root) or (by_a_signal and says_little_by_itself(view, root)) else root


def recorded_cause(view: JobView) -> datetime | None:
    """When the root cause failed that was written down last, while its pod waits for its replacement.

    A consequence never takes this place: else two pods that fail in turn would hide one another from the limit for ever.
    """
    last = view.restarts.last
    if last is None:
        return None
    if any((pod.role.status_name, pod.index) == (last.role, last.index) for pod in view.declared_failed):
        return last.time
    for pod in view.failed:
        if (
            pod.uid in view.restarts.accounted
            and (pod.role.status_name, pod.index) == (last.role, last.index)
            and pod.ended.replace(microsecond=0) >= last.time
            and not view.lost_its_peers(pod)
        ):
            # Later only where its node's clock was ahead: then what was written down holds.
            return min(pod.ended, last.time + timedelta(seconds=1))
    return None


def says_little_by_itself(view: JobView, pod: PodView) -> bool:
    """Whether the exit code is that of a user's program, which ends so for a mistake of its own and for a lost peer alike."""
    of_the_user = not view.runs_our_loop and pod.role is Role.WORKER
    return of_the_user and 0 < (pod.exit_code or 0) < 128 and DISRUPTED not in pod.conditions


def verdict(view: JobView, root: PodView) -> Verdict:
    """What the exit code of the pod that failed first is taken for."""
    if not says_little_by_itself(view, root):
        return Verdict.CAUSE
    others = list(_others(view))
    if any(_taken_away(view, pod) for _, pod in others):
        return Verdict.CONSEQUENCE
    waits = not view.reached(open_until(view, root))
    if waits and any(pod is None or not pod.ready or pod.node != root.node for _, pod in others):
        return Verdict.OPEN
    if any(pod is None or not pod.scheduled for _, pod in others):
        return Verdict.CONSEQUENCE
    return Verdict.CAUSE if all(pod is not None and pod.ready for _, pod in others) else Verdict.UNSURE


def open_until(view: JobView, root: PodView) -> datetime:
    """When the loss of any other node would have shown."""
    return view.until(root.ended, NODE_LOSS_SHOWS_WITHIN)


def _others(view: JobView) -> Iterator[tuple[Slot, PodView | None]]:
    """The places whose pod has not ended: those that ended say themselves how."""
    for slot in view.wanted:
        pod = view.present.get(slot)
        if not view.needs_no_pod(slot) and (pod is None or not pod.done or pod.deleting):
            yield slot, pod


def _taken_away(view: JobView, pod: PodView | None) -> bool:
    """Whether the job had the pod of a place, and lost it or is about to."""
    if pod is None or not (pod.scheduled or pod.deleting):
        return view.status.is_true(ConditionType.SCHEDULED) or view.status.is_true(ConditionType.RESTARTING)
    return pod.deleting or pod.silent_since is not None or DISRUPTED in pod.conditions
