"""How many workers a local run is asked to have: a file of its folder, which `disttrain scale` writes and the run reads.

On a cluster the scale subresource changes `spec.worker.replicas`; here the wish stands for that. A file holds after `kill -9` of the run,
also for `--resume`, until the job's file itself asks for another number than it did.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from disttrain.api.job import DistTrainJob
from disttrain.local.folders import replace_json
from disttrain.local.runs import ROOT, NoSuchRun, find_run, is_running

_NAME = "scale.json"


class CannotScale(Exception):
    """The number of workers cannot be changed; the text says why, and what to do."""


class _Wish(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(strict=True)
    replicas: int = Field(ge=1)
    file_replicas: int
    """`spec.worker.replicas` in the job's file at that time."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """What was asked of a run."""

    run: str
    before: int
    after: int


def ask(run: str, replicas: int, root: Path = ROOT) -> Scaled:
    """Asks a run for another number of workers. run: its folder, the folder's name, or the job's name, which stands for its newest run.

    Raises CannotScale, OSError.
    """
    try:
        folder = find_run(run, root)
    except NoSuchRun as error:
        raise CannotScale(str(error)) from None
    if not is_running(folder):
        raise CannotScale(
            f"run {folder.name} is over; `disttrain run --resume FILE` goes on from its last checkpoint, with worker.replicas of FILE"
        )
    job = _job(folder)
    worker, elastic = job.spec.worker, job.spec.worker.elastic
    if job.spec.trainer.command is not None:
        raise CannotScale(
            f"run {folder.name} is of a trainer.command, which starts and connects its processes itself: their number is fixed"
        )
    if elastic is None:
        raise CannotScale(
            f"run {folder.name} is not elastic: its job needs worker.elastic, such as {{minReplicas: 1, maxReplicas: 4}}, from its start"
        )
    if not elastic.min_replicas <= replicas <= elastic.max_replicas:
        raise CannotScale(
            f"{replicas} is outside of worker.elastic of run {folder.name}: choose {elastic.min_replicas} to {elastic.max_replicas}"
        )
    wish = _read(folder)
    before = wish.replicas if wish else worker.replicas
    file_replicas = wish.file_replicas if wish else worker.replicas
    replace_json(folder / _NAME, {"replicas": replicas, "file_replicas": file_replicas})
    return Scaled(folder.name, before, replicas)


def wished(folder: Path) -> int | None:
    """The number of workers that the run of this folder was asked for; None when it was not."""
    wish = _read(folder)
    return None if wish is None else wish.replicas


def carried_over(job: DistTrainJob, folder: Path) -> DistTrainJob:
    """A job that goes on, with the number of workers that was last asked for. A wish that its file has overtaken is removed."""
    wish, elastic = _read(folder), job.spec.worker.elastic
    if wish is None:
        return job
    holds = elastic is not None and elastic.min_replicas <= wish.replicas <= elastic.max_replicas
    if not holds or wish.file_replicas != job.spec.worker.replicas:
        (folder / _NAME).unlink(missing_ok=True)
        return job
    return with_workers(job, wish.replicas)


def with_workers(job: DistTrainJob, replicas: int) -> DistTrainJob:
    """The job with another number of workers, as a change of its spec leaves it."""
    worker = job.spec.worker.model_copy(update={"replicas": replicas})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"worker": worker})})


def _job(folder: Path) -> DistTrainJob:
    try:
        return DistTrainJob.parse(json.loads((folder / "job.json").read_text()))
    except FileNotFoundError:
        raise CannotScale(f"run {folder.name} has not begun yet: try again in a moment") from None
    except ValueError:
        raise CannotScale(f"{folder / 'job.json'} cannot be read: another version of disttrain wrote it") from None


def _read(folder: Path) -> _Wish | None:
    try:
        return _Wish.model_validate_json((folder / _NAME).read_bytes())
    except (OSError, ValidationError):
        return None
