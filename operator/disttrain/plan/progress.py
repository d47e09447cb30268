"""The master's report as status.training: rounded numbers, percent, time left; and how often that is worth a write."""

import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from types import MappingProxyType

from disttrain.api.health import HealthMetric, HealthRule
from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role
from disttrain.api.reasons import ConditionType, JobState
from disttrain.api.runtime import Progress
from disttrain.api.spec import DistTrainJobSpec
from disttrain.api.status import BestCheckpoint, CheckpointStatus, ModelStatus, RollBack, RollBacks, TrainingStatus
from disttrain.api.types import INT32_MAX
from disttrain.api.values import NAME
from disttrain.plan.model import Phase
from disttrain.plan.view import REPORT_TIMEOUT, JobView
from disttrain.plan.words import without_clock

_FIGURES = frozenset(
    {
        "best",
        "dropped_samples",
        "epoch",
        "evaluation",
        "evaluation_step",
        "goodput",
        "gradient_norm",
        "last_checkpoint",
        "last_update_time",
        "loss",
        "max_staleness_seen",
        "redone_steps",
        "roll_backs",
        "samples_per_second",
        "staleness",
        "step",
        "values",
    }
)
"""Fields of a report that change what the status shows of a job that trains, and no decision about it until the next pass."""
_WITHOUT_A_STEP = frozenset({"best", "evaluation", "evaluation_step", "last_checkpoint", "roll_backs"})
"""Those of them that the status shows before another step is made. The others, such as a speed that decays, come with it."""
LONGEST_READ_INTERVAL = timedelta(seconds=10)
"""A part of REPORT_TIMEOUT, so that a single failed reading does not make a master silent."""


LONGEST_PAUSE = timedelta(days=1)
"""A speed that was measured of almost nothing must not make a silence last for ever."""


def training(view: JobView, *, moves: bool) -> TrainingStatus | None:
    """status.training after this pass, if it is written at all; the stored one when there is no news. Unless steps are made (`moves`) it
    holds no speed and no time left: they would be those of a training that is not there."""
    after = _training(view)
    return (
        after if after is None or moves else after.model_copy(update={"eta_seconds": None, "samples_per_second": None})
    )


def without_set_aside(training: TrainingStatus, roll_back: RollBack) -> TrainingStatus:
    """Without the best checkpoint that the next attempt sets aside: it reports another one once it has one."""
    best = training.best_checkpoint
    return (
        training
        if best is None or best.step <= roll_back.step
        else training.model_copy(update={"best_checkpoint": None})
    )


def usual_pause(view: JobView) -> timedelta:
    """How long nothing need be seen of a training that makes steps: three times as long as its steps take, or as a program took
    to report the last one; at least a minute."""
    training, usual = view.status.training, timedelta(seconds=min(_usual_step(view), INT32_MAX))
    if not view.runs_our_loop and training is not None:
        # A program reports when it likes; our own loop reports each step. How seldom the status is written says nothing about either.
        usual = max(usual, timedelta(seconds=training.update_seconds or 0) - interval(view))
    return max(REPORT_TIMEOUT, min(3 * usual, LONGEST_PAUSE))


def _usual_step(view: JobView) -> float:
    """Seconds of a step, 0 for not known: by the speed at the last step, else by the time that all of them took. The report that is read
    now does not tell: without a step, its speed decays."""
    training, goodput = view.status.training, view.status.goodput
    if training is None or training.last_update_time is None:
        return 0
    if view.runs_our_loop and (speed := training.samples_per_second or 0) > 0:
        return view.spec.trainer.batch_size / speed
    if goodput is None or goodput.accounted_until is None or training.step == 0:
        return 0
    after = max(0.0, (goodput.accounted_until - training.last_update_time).total_seconds())
    return max(0.0, goodput.productive_seconds - after) / training.step


def _training(view: JobView) -> TrainingStatus | None:
    before = view.status.training
    progress = newest(view)
    if progress is None:
        return before
    if before is not None and progress.step == before.step:
        # No step: speed and time left would only decay. What can still come is the end of the job.
        reported = {
            "last_checkpoint": _checkpoint(progress),
            "evaluation": _evaluation(progress),
            "evaluation_step": progress.evaluation_step,
            "best_checkpoint": _best(progress),
            "roll_backs": _roll_backs(progress),
            "model": _model(progress),
            "world_size": progress.world_size or None,
            "resumed": progress.resumed if progress.world_size else None,
            # The mean of the last steps is known at the end: before it was that of the newest reports.
            "loss": rounded(progress.loss, 4) if progress.finished else None,
            "values": _values(progress) if progress.finished else None,
        }
        return before.model_copy(update={name: value for name, value in reported.items() if value is not None})
    return TrainingStatus(
        step=progress.step,
        total_steps=progress.total_steps,
        epoch=progress.epoch,
        progress_percent=min(100, 100 * progress.step // progress.total_steps) if progress.total_steps else None,
        eta_seconds=_seconds_left(view, progress),
        loss=rounded(progress.loss, 4),
        values=_values(progress),
        samples_per_second=rounded(progress.samples_per_second, 5),
        world_size=progress.world_size,
        max_staleness_seen=progress.max_staleness_seen,
        evaluation=_evaluation(progress),
        evaluation_step=progress.evaluation_step,
        last_update_time=last_advance(view, progress),
        update_seconds=_between_advances(view, progress),
        last_checkpoint=_checkpoint(progress) or (before.last_checkpoint if before else None),
        best_checkpoint=_best(progress) or (before.best_checkpoint if before else None),
        roll_backs=_roll_backs(progress) or (before.roll_backs if before else None),
        model=_model(progress),
        dropped_samples=progress.dropped_samples,
        resumed=progress.resumed if progress.world_size else before.resumed if before else None,
    )


def due(view: JobView) -> bool:
    """Whether progress alone is worth a write: not more often than statusIntervalSeconds. A last step that no other followed for some time
    is: what counts from it (a stall, a recovery) counts from what is written. So is a final report, after which no other comes."""
    last = newest(view)
    if last is not None and last is not view.progress:
        return True
    before, seen = view.status.training, view.snapshot.step_seen
    if before is None or before.last_update_time is None:
        return True
    if view.steps_now and seen is not None and view.reached(seen + REPORT_TIMEOUT):
        return True
    return view.reached(before.last_update_time + interval(view))


def pass_after(job: DistTrainJob, before: Progress | None, after: Progress, now: datetime) -> timedelta | None:
    """How long the pass can wait that a report asks for: until its figures may be written, if it has newer figures than the one before and
    nothing else is new, and longer if none of them is shown. None: the pass is made at once."""
    status, training = job.status, job.status.training
    if status.state is not JobState.TRAINING or not status.is_true(ConditionType.PROGRESSING):
        return None  # a step may change the state
    if training is None or training.last_update_time is None:
        return None
    if before is None or after.step < before.step or _beside_figures(after) != _beside_figures(before):
        return None
    if _a_breach_begins_or_ends(job, before, after):
        return None
    if after.step == before.step and all(getattr(after, name) == getattr(before, name) for name in _WITHOUT_A_STEP):
        return REPORT_TIMEOUT
    due = training.last_update_time + timedelta(seconds=job.spec.observability.status_interval_seconds)
    # Also where progress is written seldom: the last step that no other follows is written after this time (`due`).
    return max(timedelta(0), min(due - now, REPORT_TIMEOUT))


_REPORTED: Mapping[HealthMetric, Callable[[Progress], float | None]] = MappingProxyType(
    {
        HealthMetric.LOSS: lambda progress: progress.loss,
        HealthMetric.SAMPLES_PER_SECOND: lambda progress: progress.samples_per_second,
        HealthMetric.GRADIENT_NORM: lambda progress: progress.gradient_norm,
        HealthMetric.STALENESS: lambda progress: progress.staleness,
    }
)
"""The metrics of spec.health that are in a report."""


def reported(metric: HealthMetric, report: Progress) -> float | None:
    """The metric of a report; None where it does not have it."""
    value = _REPORTED[metric](report) if metric in _REPORTED else None
    return None if value is None or math.isnan(value) else value


def is_good(rule: HealthRule, report: Progress) -> bool | None:
    """Whether a report is within the bound of a rule; None where it does not have the metric."""
    value = reported(rule.metric, report)
    return None if value is None else not rule.broken_by(value)


def _a_breach_begins_or_ends(job: DistTrainJob, before: Progress, after: Progress) -> bool:
    """Whether a rule of spec.health has to be judged now."""
    if job.spec.health is None:
        return False
    in_breach = {entry.name for entry in job.status.health if entry.since is not None}
    return any(
        (is_good(rule, before) is False) != (is_good(rule, after) is False)
        or (rule.metric is HealthMetric.STEP_AGE and rule.name in in_breach and after.step > before.step)
        for rule in job.spec.health.rules
    )


def _beside_figures(report: Progress) -> tuple[object, ...]:
    """What a report says beside its figures, without running seconds."""
    names = Progress.model_fields.keys() - _FIGURES - {"waiting_for"}
    return without_clock(report.waiting_for or ""), *(getattr(report, name) for name in sorted(names))


def interval(view: JobView) -> timedelta:
    """Between two writes of the progress."""
    return timedelta(seconds=view.spec.observability.status_interval_seconds)


def read_interval(spec: DistTrainJobSpec) -> timedelta:
    """Between two readings of the master's report. It is short enough for REPORT_TIMEOUT, however seldom the status is written."""
    return min(LONGEST_READ_INTERVAL, timedelta(seconds=spec.observability.status_interval_seconds))


def rounded(value: float | None, digits: int) -> float | None:
    """A number of so many significant digits, or a whole one that has more: 0.1834, 5120.4, 131072. None for infinity and NaN, which are
    no JSON."""
    if value is None or not math.isfinite(value):
        return None
    short = float(round(value)) if 10.0**digits <= abs(value) < 1e15 else float(f"{value:.{digits}g}")
    return short if math.isfinite(short) else value  # the largest numbers round up to infinity


def is_another_step(progress: Progress, before: Progress | None) -> bool:
    """Whether a report is about another step than the one that was read before it: the moment of its reading is when the step was seen."""
    return before is None or (before.attempt, before.step) != (progress.attempt, progress.step)


def is_news(progress: Progress, before: Progress | None, read: datetime | None, now: datetime) -> bool:
    """Whether a report asks for a pass: it differs from the one that was read before it, or that one was too old to believe."""
    return progress != before or read is None or now - read >= REPORT_TIMEOUT


def last_advance(view: JobView, progress: Progress) -> datetime | None:
    """When the step last advanced, by our clock: that of the master may be wrong. A fall back to a checkpoint is no advance."""
    before = view.status.training
    stored = before.last_update_time if before is not None else None
    if progress.step <= (before.step if before is not None else 0):
        return stored
    seen = view.snapshot.step_seen if progress is view.progress else None
    moment = seen.replace(microsecond=0) if seen is not None else view.second
    return max(moment, stored) if stored is not None else moment


def _between_advances(view: JobView, progress: Progress) -> int | None:
    before = view.status.training
    if before is None or before.last_update_time is None or progress.step <= before.step:
        return before.update_seconds if before is not None else None
    last = last_advance(view, progress) or view.second
    return max(0, int((last - before.last_update_time).total_seconds()))


def newest(view: JobView) -> Progress | None:
    """The newest report of this attempt. The termination message of a pod that succeeded is newer than any report that was read before; in
    a job that is being suspended that of any pod is, and no other pod of this attempt follows."""
    words = [
        pod.termination.progress
        for pod in view.present.values()
        if (pod.phase is Phase.SUCCEEDED or (view.spec.suspend and pod.done)) and pod.termination.progress is not None
    ]
    final = [progress for progress in words if progress.attempt == view.attempt]
    if not final and view.spec.suspend and (Role.MASTER, 0) not in view.present:
        return None  # the last report of the master, which is gone, is written: what was read before it is no news
    return max(final, key=lambda progress: progress.step) if final else view.progress


def _seconds_left(view: JobView, progress: Progress) -> int | None:
    if progress.finished:
        return 0
    rate = _steps_per_second(view, progress)
    if progress.total_steps is None or rate is None:
        return None
    seconds = max(0, progress.total_steps - progress.step) / rate
    return round(seconds) if seconds < INT32_MAX else None


def _steps_per_second(view: JobView, progress: Progress) -> float | None:
    """The master's own measure for our loop; for a script, the steps since the last entry."""
    speed = progress.samples_per_second
    if view.runs_our_loop and speed is not None and 0 < speed < math.inf:
        return speed / view.spec.trainer.batch_size
    before = view.status.training
    if before is None or before.last_update_time is None or progress.step <= before.step:
        return None
    elapsed = (view.now - before.last_update_time).total_seconds()
    return (progress.step - before.step) / elapsed if elapsed > 0 else None


def _checkpoint(progress: Progress) -> CheckpointStatus | None:
    newest = progress.last_checkpoint
    return None if newest is None else CheckpointStatus(step=newest.step, time=newest.time.replace(microsecond=0))


def _roll_backs(progress: Progress) -> RollBacks | None:
    done = progress.roll_backs
    if done is None:
        return None
    return RollBacks(count=done.count, left_out_parts=done.left_out_parts, reason=done.reason)


def _best(progress: Progress) -> BestCheckpoint | None:
    best = progress.best
    return None if best is None else BestCheckpoint(step=best.step, value=best.value)


def _model(progress: Progress) -> ModelStatus | None:
    written = progress.model
    return None if written is None else ModelStatus(path=written.path, sha256=written.sha256)


def _values(progress: Progress) -> dict[str, float] | None:
    found = {
        name: rounded(value, 4) for name, value in sorted((progress.values or {}).items()) if re.fullmatch(NAME, name)
    }
    return {name: value for name, value in found.items() if value is not None} or None


def _evaluation(progress: Progress) -> dict[str, float] | None:
    """The user's names, as many and as long as a status may hold."""
    found = {name[:253]: rounded(value, 5) for name, value in sorted((progress.evaluation or {}).items())[:32]}
    return {name: value for name, value in found.items() if value is not None} or None
