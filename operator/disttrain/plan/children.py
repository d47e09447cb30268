"""What a job is made of against what there is: Service, NetworkPolicy, pods. Makes what is missing, removes what is old.

Not here: the certificate, which comes before the pods (certificate.py); whether a failed pod counts (failures/). A pod is removed only
after that was written down.
"""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from types import MappingProxyType

from disttrain.api.names import ChildKind, Role
from disttrain.api.policies import NetworkPolicyMode
from disttrain.api.reasons import Reason
from disttrain.plan import certificate, disruptions, gang, host_access, lost_nodes, words
from disttrain.plan.failures import account
from disttrain.plan.model import (
    Action,
    Create,
    CreatePod,
    Delete,
    DeletePod,
    Event,
    Phase,
    PodView,
    Refusal,
)
from disttrain.plan.step import Step
from disttrain.plan.view import JobView

REFUSAL_DELAY = timedelta(seconds=10)
"""Until a child that was refused, or whose name is taken, is tried again."""
WRONG_OBJECT_DELAY = timedelta(seconds=60)
"""The same for one that the API server rejects as invalid. An admission policy answers so too (422), and it may change."""


NEEDED: Mapping[ChildKind, Callable[[JobView], bool]] = MappingProxyType(
    {
        ChildKind.COSCHEDULING_GROUP: lambda view: gang.needs(view, ChildKind.COSCHEDULING_GROUP),
        ChildKind.VOLCANO_GROUP: lambda view: gang.needs(view, ChildKind.VOLCANO_GROUP),
        ChildKind.SERVICE: lambda _: True,
        ChildKind.NETWORK_POLICY: lambda view: view.spec.network.policy is NetworkPolicyMode.JOB_ONLY,
    }
)
"""Whether a job needs its object of a kind, in the order in which they are created. One that it no longer needs is deleted."""


def converge(view: JobView) -> Step:
    """What is missing is made, what is old is deleted."""
    deletions: tuple[Action, ...] = (*_deletions(view), *lost_nodes.forced(view))
    deletions += tuple(
        Delete(kind=kind) for kind, needed in NEEDED.items() if kind in view.snapshot.children and not needed(view)
    )
    lost = disruptions.one_more(view) if disruptions.taken_away(view) else disruptions.carried_over(view)
    waiting = _held(view, disruptions.paused_until(lost)) or _impossible(view) != ""
    first = None if waiting else certificate.before_pods(view)
    creations = () if waiting else tuple(_creations(view, pods=first is None))
    if lost is not None and any(isinstance(action, CreatePod) for action in creations):
        lost = disruptions.made_again(view, lost)
    return Step(
        # That of the certificate first: a creation that is refused ends the pass, and the name of a former Secret is forgotten with it.
        actions=(*deletions, *(first.actions if first is not None else ()), *creations),
        status={"disruptions": lost, **(first.status if first is not None else {})},
        events=_created_event(view, creations),
        again=first is not None and first.again,
    )


def _created_event(view: JobView, creations: tuple[Action, ...]) -> tuple[Event, ...]:
    # The pass that made the pods may not have been the one to write of it.
    making = any(isinstance(action, CreatePod) for action in creations)
    if view.started or not (making or view.snapshot.pods):
        return ()
    made = ", ".join(words.count(number, role) for role, number in view.replicas.items())
    return (Event(reason=Reason.CREATED, message=f"Creating {made}"),)


def blocked(view: JobView) -> str:
    """Why the job cannot be made as it is; "" when it can. Part of a job would hold nodes and never train."""
    if why := _impossible(view):
        return why
    if refusal := final_refusal(view):
        return f"{refusal.name} could not be created: {refusal.message}"
    return ""


def _impossible(view: JobView) -> str:
    """Why there is no use in trying."""
    if fields := view.unsupported:
        return f"Not supported by this version: {', '.join(fields)}"
    if why := host_access.refused(view):
        return why
    if (problem := gang.problem(view)) is not None:
        return problem[1]
    if view.snapshot.name_conflicts:
        names = ", ".join(sorted(view.snapshot.name_conflicts))
        return f"Other objects have names that the job needs: {names}; delete them, or give the job another name"
    return ""


def blocked_reason(view: JobView) -> Reason:
    """The reason to `blocked`."""
    if view.unsupported:
        return Reason.NOT_YET_SUPPORTED
    if host_access.refused(view):
        return Reason.TEMPLATE_NOT_ALLOWED
    if (problem := gang.problem(view)) is not None:
        return problem[0]
    return Reason.NAME_TAKEN if view.snapshot.name_conflicts else Reason.POD_REFUSED


def final_refusal(view: JobView) -> Refusal | None:
    """A refusal that a change of the job will have to mend."""
    return next((refusal for refusal in view.refusals if not refusal.retryable), None)


def retryable_refusal(view: JobView) -> Refusal | None:
    """A refusal that may pass, such as a quota."""
    return next((refusal for refusal in view.refusals if refusal.retryable), None)


def _held(view: JobView, paused: datetime | None) -> bool:
    """Whether nothing is made yet: the back-off of a restart, or the pause after a refusal or a disruption."""
    moments = [refusal.time + (REFUSAL_DELAY if refusal.retryable else WRONG_OBJECT_DELAY) for refusal in view.refusals]
    if view.snapshot.name_conflicts or view.snapshot.former:
        moments.append(view.now + REFUSAL_DELAY)
    if paused is not None:
        moments.append(paused)
    if (moment := account.next_attempt(view)) is not None:
        moments.append(moment)
    return gang.is_backing_off(view) or not view.reached(max(moments, default=view.now))


def _deletions(view: JobView) -> Iterator[DeletePod]:
    accounted = set(view.restarts.accounted)
    for pod in view.outdated:
        if not pod.deleting:
            yield _delete(pod)
    for pod in view.failed:
        if pod.uid in accounted and view.reached(account.release(view, pod)):
            yield _delete(pod)
    for pod in view.declared_failed:
        yield _delete(pod)
    # A worker that is created again needs its master and servers, even when they have already ended well.
    if any(slot[0] is Role.WORKER and not view.needs_no_pod(slot) and slot not in view.present for slot in view.wanted):
        for (role, _), pod in view.present.items():
            if role is not Role.WORKER and pod.phase is Phase.SUCCEEDED and not pod.deleting:
                yield _delete(pod)


def _creations(view: JobView, *, pods: bool) -> Iterator[Action]:
    for kind, needed in NEEDED.items():
        if kind not in view.snapshot.children and needed(view):
            yield Create(kind=kind)
    if not pods or not gang.admitted(view):
        return
    scheduler = view.gang_scheduler
    if (view.runs_command or scheduler) and any(pod.attempt < view.attempt for pod in view.snapshot.pods):
        return  # nothing of ours in those programs refuses a peer of another attempt; and a gang waits until all of it can be placed
    pod_group = scheduler.kind if scheduler is not None else None
    image = next((pod.trainer_image for pod in view.present.values() if pod.trainer_image), "")
    for slot in view.wanted:
        # The name stays taken until a pod that is deleted or of an older attempt is really gone: never two of one place.
        if not view.needs_no_pod(slot) and view.name(slot) not in view.names_taken:
            role, index = slot
            yield CreatePod(role=role, index=index, attempt=view.attempt, trainer_image=image, pod_group=pod_group)


def _delete(pod: PodView) -> DeletePod:
    return DeletePod(name=pod.name, uid=pod.uid)
