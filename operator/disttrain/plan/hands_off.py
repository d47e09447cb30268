"""A job of which this version does not understand a part: it says so, and leaves the job and its pods as they are."""

from disttrain.api.reasons import ConditionType, JobState, Reason
from disttrain.plan.conditions import merge
from disttrain.plan.model import Event, Plan
from disttrain.plan.step import Claim
from disttrain.plan.view import JobView

_MOST = 5
"""Reasons in a message."""


def hands_off(view: JobView) -> Plan:
    """The plan for such a job: no action, and a status that is only added to."""
    reasons = "; ".join(view.snapshot.not_understood[:_MOST])
    message = f"This version of the operator does not understand the job and leaves it as it is: {reasons}"
    claim = Claim(type=ConditionType.VALID, status="False", reason=Reason.INVALID_SPEC, message=message)
    known = view.status.condition(ConditionType.VALID)
    is_new = known is None or (known.status, known.reason) != (claim.status, claim.reason)
    fields: dict[str, object] = {"conditions": merge(view, (claim,))}
    if not view.status.conditions:
        fields |= {"state": JobState.PENDING, "observed_generation": view.job.metadata.generation}
    return Plan(
        status=view.status.model_copy(update=fields),
        events=(Event(reason=claim.reason, message=message, warning=True),) if is_new else (),
    )
