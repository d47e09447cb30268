"""The account of a job's failures: how many count, how long a replacement waits, and when a checkpoint sets the count back."""

from datetime import datetime

from disttrain.api.policies import Action, FailureRule
from disttrain.api.status import LastRestart, Restarts
from disttrain.plan import disruptions
from disttrain.plan.disruptions import delay
from disttrain.plan.model import DISRUPTED, PodView
from disttrain.plan.view import JobView


def record(view: JobView, *, failed: int, counted: bool, last: LastRestart | None) -> Restarts:
    """The failures written down."""
    before = view.restarts
    return before.model_copy(
        update={
            "total": before.total + failed,
            "counted_towards_limit": view.counted_so_far + counted,
            "checkpoint_step": view.checkpoint_step if counted else before.checkpoint_step,
            "last": last or before.last,
        }
    )


def release(view: JobView, pod: PodView) -> datetime:
    """When a failed pod may be replaced. Until then it stays, and its log with it."""
    counted = view.counted_so_far if counts(view, pod) else 0
    return view.until(finished(view, pod), delay(max(counted, disruptions.in_a_row(view))))


def counts(view: JobView, pod: PodView) -> bool:
    """Whether a failure counts towards the limit: by its rule, and where the pod was evicted for its own use of memory or storage."""
    rule = rule_for(view, pod)
    return rule is None or rule.count_towards_limit or disruptions.by_its_own_use(pod)


def next_attempt(view: JobView) -> datetime | None:
    """When the pods of a restarted job may be made; None: at once. A single pod has its back-off behind it when its place is free."""
    if view.present or view.restarts.last is None:
        return None
    return view.until(view.restarts.last.time, delay(view.counted_so_far))


def finished(view: JobView, pod: PodView) -> datetime:
    """When a pod ended, never later than now: a node's clock may be ahead. A failure that is written down ended no later than was written,
    so that its back-off ends and does not begin again with every pass."""
    last = view.restarts.last
    if (
        last is not None
        and pod.uid in view.restarts.accounted
        and (pod.role.status_name, pod.index) == (last.role, last.index)
    ):
        return pod.ended if pod.ended.replace(microsecond=0) <= last.time else last.time
    if view.reached(pod.ended):
        return pod.ended
    return last.time if last is not None and pod.uid in view.restarts.accounted else view.now


def carried_over(view: JobView) -> Restarts | None:
    """The account without the uids of pods that are gone, and set back by a new checkpoint; None while nothing ever failed."""
    if view.status.restarts is None and not view.restarted_in_place:
        return None
    return of_pods_that_exist(view, view.restarts).model_copy(update={"counted_towards_limit": view.counted_so_far})


def of_pods_that_exist(view: JobView, restarts: Restarts) -> Restarts:
    """The account without what was only kept in order not to count twice, of pods that are gone."""
    uids = {pod.uid for pod in view.snapshot.pods}
    accounted = tuple(uid for uid in restarts.accounted if uid in uids)
    in_place = tuple(entry for entry in restarts.in_place if entry.pod in uids)
    return restarts.model_copy(update={"accounted": accounted, "in_place": in_place})


def rule_for(view: JobView, pod: PodView) -> FailureRule | None:
    """The rule of the failure policy that a failed pod meets first. A disruption explains any exit code, also where a user's own rules put
    exit codes first: such a rule does not fail the job for a pod that was disrupted."""
    for rule in view.spec.failure_policy.rules:
        by_code_alone = rule.on_exit_codes is not None and rule.on_pod_conditions is None
        if by_code_alone and rule.action is Action.FAIL_JOB and DISRUPTED in pod.conditions:
            continue
        code_matches = rule.on_exit_codes is None or pod.exit_code in rule.on_exit_codes
        condition_matches = rule.on_pod_conditions is None or not pod.conditions.isdisjoint(rule.on_pod_conditions)
        if code_matches and condition_matches:
            return rule
    return None
