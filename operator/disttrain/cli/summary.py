"""What is said of a run when it is over: the outcome, the numbers, and where to look. Text only."""

import os
from pathlib import Path

from disttrain.api.job import DistTrainJob
from disttrain.api.reasons import ConditionType, JobState
from disttrain.api.status import WHOLE_JOB
from disttrain.cli.durations import duration
from disttrain.local.folders import RunFolder
from disttrain.plan.words import WARNING


def summary(job: DistTrainJob, folder: RunFolder, *, seconds: float, interrupted: bool) -> str:
    """The last lines of a run."""
    state = job.status.state
    outcome = f"{state} in {duration(seconds)}" if state is JobState.COMPLETE else f"{state} after {duration(seconds)}"
    if interrupted and state not in (JobState.COMPLETE, JobState.FAILED):
        how = ""
        if job.spec.checkpoint:
            saved = job.status.training is not None and job.status.training.last_checkpoint is not None
            how = (
                "; `disttrain run --resume FILE` goes on from the last checkpoint"
                if saved
                else "; no checkpoint was written yet"
            )
        outcome = f"interrupted after {duration(seconds)}{how}"
    lines = [f"{job.metadata.name}: {outcome}"]
    for type_ in (ConditionType.FAILED, ConditionType.VALID):
        condition = job.status.condition(type_)
        if condition is not None and condition.status == ("True" if type_ is ConditionType.FAILED else "False"):
            lines.append(f"  {condition.reason}: {condition.message}")
    lines += [f"  {name:<11} {text}" for name, text in _facts(job, folder)]
    return "\n".join(lines)


def _facts(job: DistTrainJob, folder: RunFolder) -> list[tuple[str, str]]:
    facts = []
    complete = job.status.condition(ConditionType.COMPLETE)
    if complete is not None and (warning := complete.message.partition(WARNING)[2]):
        facts.append(("warning", warning))
    training, restarts = job.status.training, job.status.restarts
    # The master of a script or command may never have got a report of a step.
    if training is not None and (training.step or training.total_steps):
        epoch = f", epoch {training.epoch}" if training.epoch is not None else ""
        facts.append(
            ("steps", f"{training.step}{f' of {training.total_steps}' if training.total_steps else ''}{epoch}")
        )
    if training is not None:
        if training.resumed:
            facts.append(("start", training.resumed[0].lower() + training.resumed[1:]))
        if training.dropped_samples:
            facts.append(("left out", f"{training.dropped_samples} samples (trainer.lastBatch: Drop)"))
        if training.loss is not None:
            facts.append(("loss", f"{training.loss:.15g}"))
        if training.values:
            facts.append(("values", ", ".join(f"{name} {value:.15g}" for name, value in training.values.items())))
        if training.roll_backs is not None:
            done = training.roll_backs
            facts.append(
                ("roll-backs", f"{done.count}; left out: parts {done.left_out_parts}; the last: {done.reason}")
            )
        if training.evaluation:
            facts.append(
                ("evaluation", ", ".join(f"{name} {value:.15g}" for name, value in training.evaluation.items()))
            )
    elastic, worker = job.spec.worker.elastic, job.status.worker
    if elastic is not None and worker is not None and worker.target_replicas is not None:
        between = f"{worker.target_replicas}, elastic between {elastic.min_replicas} and {elastic.max_replicas}"
        facts.append(("workers", between))
    if restarts is not None and restarts.total:
        last = restarts.last
        who = "" if last is None or last.role == WHOLE_JOB else f"{last.role} {last.index}, "
        why = f"; the last: {who}{last.reason}" if last else ""
        why += f", exit code {last.exit_code}" if last and last.exit_code is not None else ""
        redone = f"; {job.status.goodput.redone_seconds} s redone" if job.status.goodput else ""
        facts.append(("restarts", f"{restarts.total}{why}{redone}"))
    if job.spec.checkpoint is not None and training is not None and training.last_checkpoint is not None:
        place = folder.checkpoints(job.spec.checkpoint.volume.persistent_volume_claim)
        best, keep_best = training.best_checkpoint, job.spec.checkpoint.keep_best
        named = f"; the best: step {best.step}, {keep_best.metric} {best.value:.6g}" if best and keep_best else ""
        facts.append(("checkpoint", f"step {training.last_checkpoint.step} in {place}{named}"))
    if training is not None and training.model is not None:
        path = Path(os.path.relpath(training.model.path))
        load = f'model.load_state_dict(load_file("{path}"))'
        facts += [("model", str(path)), ("", "from safetensors.torch import load_file"), ("", load)]
    facts.append(("logs", str(folder.path / "logs")))
    return facts
