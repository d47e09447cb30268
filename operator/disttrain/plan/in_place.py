"""Processes that were restarted in their pods: what is reported of them and not counted yet, and the account with it.

The launcher of a pod restarts its process within milliseconds, and counts. The numbers of a pod only grow, and reach the plan on two ways:
from the master, which learns them with each process that joins, and in the pod's own termination message. The status remembers how many of
each pod it has counted. So neither an operator nor a master that is replaced in between counts one twice. Pure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from disttrain.api.names import Role
from disttrain.api.runtime import Progress, RestartsInPlace
from disttrain.api.status import CountedInPlace, LastRestart, Restarts
from disttrain.plan.model import PodView

REASON = "Error"
"""Of `restarts.last`: as Kubernetes says it of a container that ended so."""


@dataclass(frozen=True, slots=True)
class Uncounted:
    """Restarts in place of one pod that the status does not count yet."""

    pod: PodView
    reported: RestartsInPlace
    restarts: int
    failures: int
    """How many of these count towards the limit."""


def uncounted(pods: Iterable[PodView], progress: Progress | None, counted: Restarts) -> tuple[Uncounted, ...]:
    """What is reported of these pods and not counted, by pods in their order. pods: those of the present attempt."""
    present = {pod.uid: pod for pod in pods}
    before = {entry.pod: entry for entry in counted.in_place}
    found = []
    for uid, reported in _newest(present.values(), progress).items():
        was = before.get(uid, CountedInPlace(pod=uid, restarts=0))
        restarts, failures = reported.restarts - was.restarts, max(0, reported.failures - was.failures)
        if restarts > 0:
            found.append(Uncounted(present[uid], reported, restarts, min(failures, restarts)))
    return tuple(sorted(found, key=lambda one: (one.pod.role.value, one.pod.index)))


def _newest(pods: Iterable[PodView], progress: Progress | None) -> dict[str, RestartsInPlace]:
    """The highest numbers that were reported of each pod."""
    pods = tuple(pods)
    reports = [pod.termination.restarts_in_place for pod in pods]
    for said in (progress, *(pod.termination.progress for pod in pods)):
        reports += said.restarts_in_place if said is not None else ()
    uids = {pod.uid for pod in pods}
    newest: dict[str, RestartsInPlace] = {}
    for report in reports:
        if report is None or report.pod not in uids:
            continue  # of a pod that is gone: it was counted before, or not seen while it was there, as a pod that is deleted
        if report.pod not in newest or newest[report.pod].restarts < report.restarts:
            newest[report.pod] = report
    return newest


def counted(
    account: Restarts, found: Sequence[Uncounted], *, towards_limit: int, checkpoint_step: int, now: datetime
) -> Restarts:
    """The account with these restarts in it.

    towards_limit: failures that counted so far. checkpoint_step: of the newest checkpoint.
    """
    if not found:
        return account
    entries = {entry.pod: entry for entry in account.in_place}
    for one in found:
        pod = one.pod.uid
        entries[pod] = CountedInPlace(pod=pod, restarts=one.reported.restarts, failures=one.reported.failures)
    # Several pods at once fail of one cause, as pods that fail together do. What a pod failed of again and again counts each time.
    failures = max(one.failures for one in found)
    return account.model_copy(
        update={
            "total": account.total + sum(one.restarts for one in found),
            "counted_towards_limit": towards_limit + failures,
            "checkpoint_step": checkpoint_step if failures else account.checkpoint_step,
            "last": _last(account, found, now),
            "in_place": tuple(entries[pod] for pod in sorted(entries)),
        }
    )


def _last(account: Restarts, found: Sequence[Uncounted], now: datetime) -> LastRestart | None:
    """A failed pod that waits for its replacement stays there, since its consequences are known by it. A process that lost its peers is
    the cause of nothing, and stands there only where nothing else does."""
    cause = newest(found)
    if cause is None or account.accounted or (account.last is not None and not cause.failures):
        return account.last
    return LastRestart(
        role=cause.pod.role.status_name,
        index=cause.pod.index,
        reason=REASON,
        exit_code=cause.reported.exit_code,
        message=cause.reported.message,
        time=min(cause.reported.time, now).replace(microsecond=0),
    )


def by_role(found: Iterable[Uncounted], role: Role) -> int:
    """How many of the restarts are of pods of this role."""
    return sum(one.restarts for one in found if one.pod.role is role)


def newest(found: Iterable[Uncounted]) -> Uncounted | None:
    """The one that failed last, or that lost its peers last where none failed."""
    return max(found, key=lambda one: (one.failures > 0, one.reported.time), default=None)


def sentence(found: Sequence[Uncounted]) -> str | None:
    """Such as "The process of pod digits-worker-1 ended with exit code 137: killed by SIGKILL; it was started again in the pod"."""
    one = newest(found)
    if one is None:
        return None
    more = f" (and those of {len(found) - 1} more pods)" if len(found) > 1 else ""
    return f"The process of pod {one.pod.name} {_how(one)}; it was started again in the pod{more}"


def _how(one: Uncounted) -> str:
    """How it ended. The report tells of the last failure, which is none of these restarts where nothing failed but its peers."""
    if not one.failures:
        return "lost its peers"
    often = f" {one.restarts} times, the last time" if one.restarts > 1 else ""
    code, said = f"with exit code {one.reported.exit_code}", one.reported.message
    if said.startswith(f"ended {code}"):
        code, said = said.removeprefix("ended "), ""
    return f"ended{often} {code}" + (f": {said}" if said else "")
