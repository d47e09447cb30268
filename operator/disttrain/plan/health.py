"""spec.health: what follows when a rule on the training's own facts is in breach for its forSeconds.

A rule is judged by the master's report, and only while the job trains. status.health keeps since when it is in breach and how often it
rolled the job back, so that a new operator goes on from there. Not here: how an attempt finds the checkpoint that it goes back to (the
trainer's checkpoint/store.py, by status.rollBack).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TypeAlias

from disttrain.api.health import HealthAction, HealthMetric, HealthRule
from disttrain.api.reasons import ConditionType, Reason
from disttrain.api.status import HealthStatus, RollBack
from disttrain.api.types import INT32_MAX
from disttrain.plan import children
from disttrain.plan.completion import fail
from disttrain.plan.failures import steps
from disttrain.plan.model import Event, SuspendJob
from disttrain.plan.progress import is_good, last_advance, reported
from disttrain.plan.step import Claim, Step
from disttrain.plan.view import JobView

MOST_ROLL_BACKS = 3
"""Roll-backs of one rule without a newer checkpoint between."""

Answer: TypeAlias = Callable[[JobView, HealthRule, HealthStatus, str], Step]


def broken(view: JobView) -> Step | None:
    """What the first rule asks for that has been in breach for long enough; None when there is none."""
    for rule, entry in _judged(view):
        if entry.done and rule.action is HealthAction.SUSPEND:
            return _suspend_job(view)
        if entry.since is None or entry.done or not _trains(view):
            continue
        value = _value(view, rule.metric)
        if value is not None and view.reached(entry.since + timedelta(seconds=rule.for_seconds)):
            said = f"{rule.metric.value} is {_plain(value)}, {rule.bound} for {rule.for_seconds} s"
            message = f"Rule {rule.name} of spec.health: {said}"
            return ANSWERS[rule.action](view, rule, entry, message)
    return None


def carried_over(view: JobView) -> tuple[HealthStatus, ...]:
    """What is to be remembered of each rule after this pass."""
    return tuple(entry for rule, entry in _judged(view) if entry != HealthStatus(name=rule.name))


def _judged(view: JobView) -> tuple[tuple[HealthRule, HealthStatus], ...]:
    """Each rule, with what is known of it now."""
    if view.spec.health is None:
        return ()
    stored = {entry.name: entry for entry in view.status.health}
    trains = _trains(view)
    return tuple(
        (rule, _judge(view, rule, stored.get(rule.name) or HealthStatus(name=rule.name), trains=trains))
        for rule in view.spec.health.rules
    )


def _judge(view: JobView, rule: HealthRule, before: HealthStatus, *, trains: bool | None) -> HealthStatus:
    if trains is None or (before.done and rule.action is HealthAction.SUSPEND and not view.spec.suspend):
        return before
    if not trains or not _is_broken(view, rule):
        return before.model_copy(update={"since": None, "step": None, "done": False})
    if before.since is not None:
        return before
    return before.model_copy(update={"since": view.second, "step": _last_good_step(view, rule)})


def _is_broken(view: JobView, rule: HealthRule) -> bool:
    """Whether the metric is beyond the bound now. A step ages without a report: the moment is noted."""
    if rule.metric is HealthMetric.STEP_AGE and rule.above is not None:
        return view.reached(_last_step(view) + timedelta(seconds=min(max(rule.above, 0), INT32_MAX)))
    return view.progress is not None and is_good(rule, view.progress) is False


def _trains(view: JobView) -> bool | None:
    """Whether the training makes steps that tell how it is; None while this operator has yet to read its first report."""
    if view.spec.suspend or view.finished or not view.whole:
        return False
    progress = view.progress
    if progress is None:
        return None if view.snapshot.progress_read is None else False
    ends = progress.total_steps is not None and progress.step >= progress.total_steps
    return progress.last_update_time is not None and not ends and not progress.finished


def _value(view: JobView, metric: HealthMetric) -> float | None:
    """The metric now; None where it does not exist."""
    if view.progress is None:
        return None
    if metric is HealthMetric.STEP_AGE:
        return (view.now - _last_step(view)).total_seconds()
    return reported(metric, view.progress)


def _plain(value: float) -> str:
    """Four digits, or a whole number that has more: 0.1834, 12345."""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _last_step(view: JobView) -> datetime:
    """Since when no step was made: from the last one, or from the moment at which every pod was ready."""
    ready = view.status.condition(ConditionType.READY)
    moments = (
        view.whole_since,
        ready.last_transition_time if ready is not None else None,
        last_advance(view, view.progress) if view.progress is not None else None,
    )
    return max((moment for moment in moments if moment is not None), default=view.now)


def _last_good_step(view: JobView, rule: HealthRule) -> int:
    """The last step that is known to be from before a breach that is seen for the first time."""
    progress, before = view.progress, view.snapshot.progress_before
    assert progress is not None, "a breach is seen in a report"
    if rule.metric is HealthMetric.STEP_AGE:
        return progress.step  # its breach begins after the last step
    if before is not None and before.attempt == view.attempt and is_good(rule, before):
        return min(before.step, progress.step)
    return min(_stored_good_step(view), progress.step)


def _stored_good_step(view: JobView) -> int:
    """The stored step if it is one of this attempt; else what this attempt began from."""
    training, roll_back, began = view.status.training, view.status.roll_back, view.attempt_began
    if training is None:
        return 0
    if view.attempt == 1 or (began and training.last_update_time and training.last_update_time > began):
        return training.step
    if roll_back is not None and roll_back.attempt == view.attempt:
        return roll_back.step
    return training.last_checkpoint.step if training.last_checkpoint is not None else 0


def _event(view: JobView, rule: HealthRule, entry: HealthStatus, message: str) -> Step:
    """Says so, once a breach."""
    if rule.action is HealthAction.SUSPEND:
        message += "; the job is suspended"
    return Step(
        status={"health": _with(view, entry.model_copy(update={"done": True}))},
        events=(Event(reason=Reason.HEALTH_RULE, message=message, warning=True),),
        again=True,
    )


def _suspend_job(view: JobView) -> Step:
    """That the job is suspended is written down, and only the spec does not say so yet. Until the API server takes that, the job is looked
    after as any other."""
    step, refusal = children.converge(view), view.snapshot.suspend_refused
    if refusal is None or view.reached(refusal.time + children.WRONG_OBJECT_DELAY):
        step = replace(step, actions=(*step.actions, SuspendJob()))
    if refusal is None:
        return step
    remedy = (
        "apply deploy/base/rbac of the operator's release"
        if refusal.retryable
        else "the cluster's admission policies have to allow it"
    )
    message = f"A rule of spec.health suspends the job, but the operator may not set spec.suspend: {remedy} ({refusal.message})"
    claim = Claim(type=ConditionType.SUSPENDED, status="False", reason=Reason.NOT_SUSPENDED, message=message)
    return replace(step, claims=(*step.claims, claim))


def _restart_job(view: JobView, rule: HealthRule, entry: HealthStatus, message: str) -> Step:
    if over := steps.limit_exceeded(view, message):
        return over
    return steps.restart_by_rule(view, Reason.HEALTH_RULE, message)


def _roll_back(view: JobView, rule: HealthRule, entry: HealthStatus, message: str) -> Step:
    """A new attempt, which takes no checkpoint from after the breach began."""
    checkpoint, step, before = view.spec.checkpoint, entry.step or 0, view.status.roll_back
    assert checkpoint is not None, "a rule of the spec sees to it"
    newer = before is None or step // checkpoint.every_steps > before.step // checkpoint.every_steps
    if not newer and entry.roll_backs >= MOST_ROLL_BACKS:
        return fail(
            view,
            Reason.HEALTH_RULE,
            f"{message}. It rolled the job back {entry.roll_backs} times without a newer checkpoint",
        )
    after = HealthStatus(name=entry.name, roll_backs=1 if newer else entry.roll_backs + 1)
    said = f"{message}; going back to the newest checkpoint up to step {step}, later ones are not taken any more"
    answer = steps.restart_by_rule(view, Reason.HEALTH_RULE, said, counted=False)
    roll_back = RollBack(attempt=view.attempt + 1, step=step)
    return replace(
        answer, status={**answer.status, "health": (after,) if newer else _with(view, after), "roll_back": roll_back}
    )


def _fail_job(view: JobView, rule: HealthRule, entry: HealthStatus, message: str) -> Step:
    return fail(view, Reason.HEALTH_RULE, message)


def _with(view: JobView, changed: HealthStatus) -> tuple[HealthStatus, ...]:
    """status.health with this entry."""
    others = [entry for entry in carried_over(view) if entry.name != changed.name]
    names = [rule.name for rule, _ in _judged(view)]
    return tuple(sorted((*others, changed), key=lambda entry: names.index(entry.name)))


ANSWERS: Mapping[HealthAction, Answer] = MappingProxyType(
    {
        # What a later pass does to the spec is written down, and posted, first.
        HealthAction.SUSPEND: _event,
        HealthAction.EVENT: _event,
        HealthAction.RESTART_JOB: _restart_job,
        HealthAction.ROLL_BACK: _roll_back,
        HealthAction.FAIL_JOB: _fail_job,
    }
)
"""What a rule can ask for."""
