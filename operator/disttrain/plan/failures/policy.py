"""The answer to the failures that are not written down yet: by their cause, and by the action that spec.failurePolicy names for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from types import MappingProxyType

from disttrain.api.environment import ExitCode
from disttrain.api.names import Role
from disttrain.api.policies import Action, FailureRule
from disttrain.api.reasons import ConditionType, Reason
from disttrain.plan import children, in_place, words
from disttrain.plan.completion import fail
from disttrain.plan.failures import cause
from disttrain.plan.failures.account import counts, finished, record, rule_for
from disttrain.plan.failures.cause import Verdict
from disttrain.plan.failures.silence import replace_silent, silent_master
from disttrain.plan.failures.steps import (
    consequences,
    limit_exceeded,
    out_of_tries,
    reason_of,
    replace_pods,
    restart_job,
    restart_uncounted,
    with_pause,
)
from disttrain.plan.model import PodView
from disttrain.plan.step import Claim, Step
from disttrain.plan.view import JobView

COLLECT_FAILURES_FOR = timedelta(seconds=3)
"""For a command: its processes fail from the loss of one, and the operator may see the first of them last."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Pods that failed, and the one of them that is the cause."""

    root: PodView
    fresh: list[PodView]
    """All failed pods that are not written down yet."""
    rule: FailureRule | None
    """The rule that the root matches first; None: the default action holds."""
    message: str


def failures(view: JobView) -> Step | None:
    """The answer; None when there is no failure that is not written down."""
    if view.runs_command and (lost := _lost_worker(view)):
        name, reason = lost
        message = f"Pod {name} {words.HOW_LOST[reason]}; the other processes cannot continue without it"
        return restart_uncounted(view, reason, message)
    if (over := _too_often_in_place(view)) is not None:
        return over
    accounted = set(view.restarts.accounted)
    fresh = [pod for pod in view.failed if pod.uid not in accounted]
    if not fresh:
        return None
    if view.runs_command and not view.reached(min(view.until(pod.ended, COLLECT_FAILURES_FOR) for pod in fresh)):
        return Step()
    root = cause.root_cause(view, fresh)
    if root is None:
        master = silent_master(view) if cause.recorded_cause(view) is None else None
        return _without_cause(view, fresh) if master is None else replace_silent(view, master, fresh)
    verdict = cause.verdict(view, root)
    rule = rule_for(view, root)
    failure = Failure(root, fresh, rule, words.failure(view, root))
    if verdict is Verdict.CONSEQUENCE:
        return _of_a_lost_peer(view, failure)
    action = rule.action if rule else view.spec.failure_policy.default_action
    if action is Action.FAIL_JOB and verdict is Verdict.OPEN:
        return _wait_for_a_lost_node(view, failure)
    if action is Action.FAIL_JOB and verdict is Verdict.UNSURE:
        doubt = "(another pod is not ready, so it may have lost its peer)"
        action, failure = Action.RESTART_REPLICA, replace(failure, message=f"{failure.message} {doubt}")
    return ACTIONS[action](view, failure)


def _fail_job(view: JobView, failure: Failure) -> Step:
    if where := _nan_loss(view):
        return fail(view, Reason.NAN_LOSS, f"The loss was not finite: {where}. {failure.message}")
    reason = Reason.USER_CODE if failure.root.exit_code == 1 else Reason.FAILURE_POLICY
    rule = f" (rule {failure.rule.name})" if failure.rule else ""
    return fail(view, reason, f"{failure.message}{rule}")


def _restart_job(view: JobView, failure: Failure) -> Step:
    root, counted = failure.root, counts(view, failure.root)
    if counted and (over := limit_exceeded(view, failure.message)):
        return over
    last = words.last_restart(root, finished=finished(view, root))
    restarts = record(view, failed=1, counted=counted, last=last)
    step = restart_job(view, blame=root.role, restarts=restarts, reason=reason_of(root), message=failure.message)
    return step if counted else with_pause(view, step)


def _restart_replica(view: JobView, failure: Failure) -> Step:
    if view.runs_command:
        return _restart_job(view, failure)  # the processes of a command cannot take a new one in
    counted = counts(view, failure.root)
    if counted and (over := limit_exceeded(view, failure.message)):
        return over
    step = replace_pods(view, failure.fresh, first=failure.root, counted=counted, message=failure.message)
    return step if counted else with_pause(view, step)


ACTIONS: Mapping[Action, Callable[[JobView, Failure], Step]] = MappingProxyType(
    {Action.FAIL_JOB: _fail_job, Action.RESTART_JOB: _restart_job, Action.RESTART_REPLICA: _restart_replica}
)
"""What spec.failurePolicy can ask for."""


def _too_often_in_place(view: JobView) -> Step | None:
    """The end of a job whose processes failed too often, though each was restarted in its pod; None when they did not."""
    last = in_place.newest(view.restarted_in_place)
    if last is None or not last.failures or view.counted_so_far <= view.spec.run_policy.backoff_limit:
        return None
    log = view.snapshot.log_hint.format(namespace=view.job.metadata.namespace, pod=last.pod.name)
    return out_of_tries(view, f"{in_place.sentence(view.restarted_in_place)}; log: {log}")


def _lost_worker(view: JobView) -> tuple[str, Reason] | None:
    """The name of a worker of a command that was taken away after the job had all its pods, and the reason."""
    if not view.status.is_true(ConditionType.SCHEDULED):
        return None
    for slot in view.wanted:
        pod = view.present.get(slot)
        if slot[0] is Role.WORKER and not view.needs_no_pod(slot) and (pod is None or pod.deleting):
            return view.name(slot), words.disruption(pod) if pod is not None else Reason.REPLACED
    return None


def _of_a_lost_peer(view: JobView, failure: Failure) -> Step:
    """A program of the user's that ended because another pod was taken away, or has no node. That is no fault of the job."""
    if view.runs_command:
        message = f"{failure.message} (after another pod of the job was lost)"
        return restart_uncounted(view, Reason.REPLICA_FAILED, message)
    return with_pause(view, consequences(view, failure.fresh, last=failure.root))


def _wait_for_a_lost_node(view: JobView, failure: Failure) -> Step:
    """The other pods go on while it is not known whether the exit code is the cause; the loss of a node shows within a minute."""
    until = cause.open_until(view, failure.root)
    text = f"{failure.message} (the job will fail at {until:%H:%M:%S} UTC, unless a node is found to be lost)"
    step = children.converge(view)
    claims = [Claim(type=ConditionType.READY, status="False", reason=Reason.REPLICA_FAILED, message=text)]
    if view.status.is_true(ConditionType.SCHEDULED):  # the job had all its pods
        claims.append(replace(claims[0], type=ConditionType.RESTARTING, status="True"))
    return replace(step, claims=tuple(claims))


def _without_cause(view: JobView, fresh: list[PodView]) -> Step:
    """Pods that lost their peers, or that failed because of another one. The first time that is no fault of the job.

    When the pods that replaced them met, made no step and lost one another again, it counts like any other failure: a network that cuts
    them off, a device that hangs. Otherwise the job would restart without end. Pods that fail one by one after the same loss are older
    than the first record of it, and belong to that loss.
    """
    ordered = sorted(fresh, key=lambda pod: (finished(view, pod), pod.role.value, pod.index))
    last = view.restarts.last
    if cause.recorded_cause(view) is not None:
        return consequences(view, fresh, last=None)
    lost_before = last is not None and last.exit_code == ExitCode.PEER_LOST and not view.stepped_since(last.time)
    if last is None or not lost_before:
        return consequences(view, fresh, last=ordered[0])
    for pod in ordered:
        rule = rule_for(view, pod)
        if (rule is None or rule.count_towards_limit) and pod.created > last.time and _met(view, pod):
            message = f"{words.failure(view, pod)}; this is the second time in a row, with no step between the two"
            return limit_exceeded(view, message) or replace_pods(view, fresh, first=pod, counted=True, message=message)
    return consequences(view, fresh, last=None)


def _met(view: JobView, pod: PodView) -> bool:
    """Whether the job was ready in the time of the pod. A pod that ends while a peer has no node does not count: the start-up and
    recovery deadlines limit how long the job waits for it."""
    ready = view.status.condition(ConditionType.READY)
    return ready is not None and (ready.status == "True" or ready.last_transition_time > pod.created)


def _nan_loss(view: JobView) -> str:
    """Where the loss was not finite, "" when no process reported such a loss."""
    reports = [view.progress, *(pod.termination.progress for pod in view.present.values())]
    return next((report.nan_loss for report in reports if report is not None and report.nan_loss), "")
