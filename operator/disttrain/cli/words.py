"""The progress of a job in words, for a terminal and for a log. No output here."""

from disttrain.api.job import DistTrainJob
from disttrain.api.reasons import ConditionType, JobState
from disttrain.api.runtime import Progress
from disttrain.api.trainer import Command
from disttrain.cli.durations import clock

_SHOWN_VALUES = 3
"""Of the named values of a loss; the status and the summary have all."""
_WAITING = (ConditionType.VALID, ConditionType.SCHEDULED, ConditionType.READY)


def numbers(job: DistTrainJob, progress: Progress | None) -> str:
    """Where the training is, or what it waits for."""
    return "  ".join(parts(job, progress))


def parts(job: DistTrainJob, progress: Progress | None) -> list[str]:
    """The same in pieces, the most wanted first."""
    step, total = steps(job, progress)
    if job.status.state in (JobState.COMPLETE, JobState.FAILED):
        return [f"step {step}/{total}"] if total else []
    if job.status.state is not JobState.TRAINING or progress is None:
        return [waiting] if (waiting := _waiting(job)) else []
    parts = []
    if step or total:
        parts.append(f"step {step}/{total}" if total else f"step {step}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    if progress.samples_per_second:
        parts.append(f"{progress.samples_per_second:.0f} samples/s")
        if total:
            # The status has one too, but is written every few seconds only.
            parts.append(f"ETA {clock((total - step) * job.spec.trainer.batch_size / progress.samples_per_second)}")
    if not isinstance(job.spec.trainer.work, Command):  # whose programs do not report to the master
        parts.append(f"workers {progress.world_size}/{job.spec.world_size}")
    parts += [f"{name} {value:.4g}" for name, value in list((progress.values or {}).items())[:_SHOWN_VALUES]]
    return parts


def _waiting(job: DistTrainJob) -> str:
    for type_ in _WAITING:
        condition = job.status.condition(type_)
        if condition is not None and condition.status != "True":
            return condition.message or condition.reason
    return ""


def steps(job: DistTrainJob, progress: Progress | None) -> tuple[int, int | None]:
    """Steps done and steps in all, by the newest report."""
    training = job.status.training
    if progress is not None and (training is None or progress.step >= training.step):
        return progress.step, progress.total_steps
    return (training.step, training.total_steps) if training is not None else (0, None)
