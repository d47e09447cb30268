"""decide: from the snapshot of a job to its plan. Pure: the same snapshot gives the same plan, on a cluster and without.

The order of the policies is the behaviour of the operator; it is written here and nowhere else. Each policy has a file of its own.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import TypeAlias

from disttrain.api.names import MANAGED_BY
from disttrain.plan import children, deadlines, elastic, gang, health, report, success, suspend
from disttrain.plan.cleanup import after_the_end
from disttrain.plan.failures.policy import failures
from disttrain.plan.hands_off import hands_off
from disttrain.plan.model import Plan, Snapshot
from disttrain.plan.step import Step
from disttrain.plan.urgency import urgency
from disttrain.plan.view import JobView

Policy: TypeAlias = Callable[[JobView], Step | None]
"""Its answer for a job; None: the next policy is asked."""

POLICIES: tuple[Policy, ...] = (
    # Work that is done stays done: no failure, deadline or suspension after it undoes it.
    success.reached,
    # Pods that the operator ends may fail or miss a deadline on the way; that is no fault of the job.
    suspend.asked,
    # The deadlines come before the retries: a job that must not run any longer is not restarted.
    deadlines.passed,
    # How many workers the job uses is written down before their pods are created or deleted.
    elastic.resize,
    # Every failure is written down before anything is created or deleted because of it.
    failures,
    # Pods that wait for others that find no node are deleted, before any is created.
    gang.timed_out,
    # A failure that is not written down yet may be why a rule on the training is in breach.
    health.broken,
    # Otherwise: what is missing is created, what is old is deleted. This policy always answers.
    children.converge,
)
"""The policies of a job that runs or is to run, in their order. The first one that answers decides."""
_ASK_AGAIN = timedelta(seconds=1)
"""Between two readings of a master's report that decides."""


def decide(snapshot: Snapshot) -> Plan:
    """The plan for a job now. Its `look_again` is by the stored status: until then time alone changes nothing."""
    view = JobView(snapshot)
    plan = _plan(view)
    first = plan.look_again if plan.look_again is not None else _until_first(view)
    if plan.asks:
        first = _sooner(first, _ASK_AGAIN)
    return replace(plan, look_again=first, write=urgency(snapshot.status, plan.status))


def look_again(snapshot: Snapshot, plan: Plan) -> timedelta | None:
    """When to look again once the status of the plan for that snapshot is stored: what a policy waits for may follow from it alone. It
    costs as much as `decide`, and is asked only after a write."""
    if plan.status is snapshot.status or plan.look_again == timedelta(0):
        return plan.look_again
    after = JobView(replace(snapshot, job=snapshot.job.model_copy(update={"status": plan.status})))
    if _plan(after).status != plan.status and not plan.actions:
        return timedelta(0)
    return _sooner(plan.look_again, _until_first(after))


def _until_first(view: JobView) -> timedelta | None:
    """Until the earliest moment that has not come and that a policy asked for."""
    return min(view.awaited) - view.now if view.awaited else None


def _sooner(one: timedelta | None, other: timedelta | None) -> timedelta | None:
    return min((wait for wait in (one, other) if wait is not None), default=None)


def _plan(view: JobView) -> Plan:
    # Another controller's job (KEP-2232), or one that is being deleted: the garbage collector deletes its children.
    if view.spec.managed_by != MANAGED_BY or view.job.metadata.deletion_timestamp is not None:
        return Plan(status=view.status)
    # The end is final, whatever the spec says since then and whatever state the pods are in.
    if view.finished:
        return after_the_end(view)
    # Another version of the operator stored it, and this one does not understand a part. Its pods stay, and nothing is created.
    if view.snapshot.not_understood:
        return hands_off(view)
    step = next(step for policy in POLICIES if (step := policy(view)) is not None)
    return report.plan(view, step)
