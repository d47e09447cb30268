"""What a job is made of against what there is: the Service, the NetworkPolicy, the pods. Makes what is missing, removes what is old.

Not here: whether a failed pod counts (restart.py). A pod is removed only after that was written down.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta

from disttrain.api.names import Role
from disttrain.api.reasons import Reason
from disttrain.api.spec import NetworkPolicyMode
from disttrain.plan import account, disruptions, lost_nodes, words
from disttrain.plan.model import (
    Action,
    CreateNetworkPolicy,
    CreatePod,
    CreateService,
    DeleteNetworkPolicy,
    DeletePod,
    Event,
    Phase,
    PodView,
    Refusal,
)
from disttrain.plan.step import Step
from disttrain.plan.validity import unsupported
from disttrain.plan.world import World

RETRY = timedelta(seconds=10)
"""Until a child that was refused, or whose name is taken, is tried again."""
SELDOM = timedelta(seconds=60)
"""The same for one that the API server calls wrong. An admission policy says so too (422), and somebody may lift it."""


def converge(world: World) -> Step:
    """What is missing is made, what is old is deleted."""
    deletions: tuple[Action, ...] = (*_deletions(world), *lost_nodes.forced(world))
    if world.spec.network.policy is NetworkPolicyMode.NONE and world.snapshot.network_policy_exists:
        deletions += (DeleteNetworkPolicy(),)
    waits = [moment for pod in world.failed if (moment := account.release(world, pod)) > world.now]
    lost = disruptions.one_more(world) if disruptions.taken_away(world) else disruptions.carried_over(world)
    held = _held_until(world, disruptions.paused_until(lost))
    waits += [moment for moment in (lost_nodes.upcoming(world), held) if moment is not None]
    creations = () if _impossible(world) or held is not None else tuple(_creations(world))
    if lost is not None and any(isinstance(action, CreatePod) for action in creations):
        lost = disruptions.made_again(world, lost)
    return Step(
        actions=(*deletions, *creations),
        status={"disruptions": lost},
        events=_news(world, creations),
        look=min(waits, default=None),
    )


def _news(world: World, creations: tuple[Action, ...]) -> tuple[Event, ...]:
    # The pass that made the pods may not have been the one to write of it.
    if world.started or not (creations or world.snapshot.pods):
        return ()
    made = ", ".join(words.count(number, role) for role, number in world.replicas.items())
    return (Event(reason=Reason.CREATED, message=f"Creating {made}"),)


def blocked(world: World) -> str:
    """Why the job cannot be made as it is; "" when it can. Part of a job would hold nodes and never train."""
    if why := _impossible(world):
        return why
    if refusal := final_refusal(world):
        return f"{refusal.name} was refused: {refusal.message}"
    return ""


def _impossible(world: World) -> str:
    """Why there is no use in trying."""
    if fields := unsupported(world.spec):
        return f"Not supported by this version: {', '.join(fields)}"
    if world.snapshot.foreign:
        return f"Names that the job needs belong to other objects: {', '.join(sorted(world.snapshot.foreign))}; delete or rename them"
    return ""


def blocked_reason(world: World) -> Reason:
    """The reason to `blocked`."""
    if unsupported(world.spec):
        return Reason.NOT_YET_SUPPORTED
    return Reason.NAME_TAKEN if world.snapshot.foreign else Reason.POD_REFUSED


def final_refusal(world: World) -> Refusal | None:
    """A refusal that a change of the job will have to mend."""
    return next((refusal for refusal in world.snapshot.refusals if not refusal.retryable), None)


def retryable_refusal(world: World) -> Refusal | None:
    """A refusal that may pass, such as a quota."""
    return next((refusal for refusal in world.snapshot.refusals if refusal.retryable), None)


def _held_until(world: World, paused: datetime | None) -> datetime | None:
    """When something may be made again, None for now: the back-off of a restart, or the pause after a refusal or a disruption."""
    moments = [refusal.time + (RETRY if refusal.retryable else SELDOM) for refusal in world.snapshot.refusals]
    if world.snapshot.foreign or world.snapshot.former:
        moments.append(world.now + RETRY)
    if paused is not None:
        moments.append(paused)
    if (moment := account.next_attempt(world)) is not None:
        moments.append(moment)
    return max((moment for moment in moments if moment > world.now), default=None)


def _deletions(world: World) -> Iterator[DeletePod]:
    accounted = set(world.restarts.accounted)
    for pod in world.outdated:
        if not pod.deleting:
            yield _delete(pod)
    for pod in world.failed:
        if pod.uid in accounted and account.release(world, pod) <= world.now:
            yield _delete(pod)
    for pod in world.given_up:
        yield _delete(pod)
    # A worker that comes again needs somebody to talk to, also when master and servers had already taken their leave.
    if any(slot[0] is Role.WORKER and not world.settled(slot) and slot not in world.present for slot in world.wanted):
        for (role, _), pod in world.present.items():
            if role is not Role.WORKER and pod.phase is Phase.SUCCEEDED and not pod.deleting:
                yield _delete(pod)


def _creations(world: World) -> Iterator[Action]:
    if not world.snapshot.service_exists:
        yield CreateService()
    if world.spec.network.policy is NetworkPolicyMode.JOB_ONLY and not world.snapshot.network_policy_exists:
        yield CreateNetworkPolicy()
    if world.runs_command and any(pod.attempt < world.attempt for pod in world.snapshot.pods):
        return  # nothing of ours in those programs refuses a peer of another attempt
    image = next((pod.trainer_image for pod in world.present.values() if pod.trainer_image), "")
    for slot in world.wanted:
        # The name stays taken until a pod that is deleted or of an older attempt is really gone: never two of one place.
        if not world.settled(slot) and world.name(slot) not in world.names_taken:
            role, index = slot
            yield CreatePod(role=role, index=index, attempt=world.attempt, trainer_image=image)


def _delete(pod: PodView) -> DeletePod:
    return DeletePod(name=pod.name, uid=pod.uid)
