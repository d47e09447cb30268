"""status.state: one word for the printer column, derived from the conditions and from nothing that is not in the status."""

from collections.abc import Iterable

from disttrain.api.reasons import ConditionType, Reason, State
from disttrain.plan.step import Claim
from disttrain.plan.world import World


def state(world: World, claims: Iterable[Claim], *, making: bool) -> State:
    """The first that holds, from the final to the tentative. `making`: pods are made before this is written down."""
    by_type = {claim.type: claim for claim in claims}

    def true(type_: ConditionType) -> bool:
        return by_type[type_].status == "True"

    progressing = by_type[ConditionType.PROGRESSING]
    if true(ConditionType.COMPLETE):
        return State.COMPLETE
    if true(ConditionType.FAILED):
        return State.FAILED
    if true(ConditionType.SUSPENDED):
        return State.SUSPENDED
    if by_type[ConditionType.SUSPENDED].reason == Reason.SUSPENDING:
        return world.status.state or State.PENDING  # what it was, until the last pod is gone
    if progressing.reason == Reason.STALLED:
        return State.STALLED
    if true(ConditionType.RESTARTING):
        return State.RESTARTING
    if progressing.reason == Reason.NO_STEP:
        return State.STALLED if true(ConditionType.READY) else State.RESTARTING
    if progressing.status == "True":
        return State.TRAINING
    if not true(ConditionType.SCHEDULED):
        return State.SCHEDULING if world.present or making else State.PENDING
    reports = world.spec.trainer.model is not None
    # A master that only we do not hear says nothing against steps that were seen before.
    if true(ConditionType.READY) and progressing.status == "Unknown" and (world.stepped or not reports):
        return State.TRAINING
    return State.STARTING
