"""The checkpoint folder of a job: which checkpoints are whole, and how one becomes whole.

step-00001200/ holds files, each written under another name and renamed, and the manifest, written last: a folder without a manifest
is no checkpoint, whatever else is in it. No two saves share the name of a file, so that one which was abandoned, but is perhaps still
being written, changes nothing that a manifest names. Works on any file system that several pods can mount.
No process writes into a folder that holds a checkpoint of another training: it refuses.
"""

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from pydantic import ValidationError

from disttrain.api import digests
from disttrain.api.course import KeepBest
from disttrain.api.runtime import JobConfig, ProgressModel
from disttrain.api.tensor_index import index_of
from disttrain_trainer.checkpoint import atomic, resuming
from disttrain_trainer.checkpoint.course import Course, is_better
from disttrain_trainer.checkpoint.manifest import NAME, Manifest, OtherFormat
from disttrain_trainer.data.schedule import DataSet, steps_per_epoch
from disttrain_trainer.errors import CRASHED, TrainerError, WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

PREFIX = "step-"
STATE = "state-"
"""How the name of the file of a rank's state (model and optimiser) begins."""
BUFFERS = "buffers-"
"""How the name of the file with a worker's buffers begins, where parameter servers save the rest."""
BLOCK = "block-"
"""How the names of the files of a sharded model's ranks begin."""
SHARD = "shard-"
"""How the names of the files of parameter servers begin."""
_LONGEST = 1000
"""Characters of what is said of a start: it travels in a termination message."""
_STEP = re.compile(rf"{PREFIX}(\d+)")


class Unreadable(TrainerError):
    """The volume does not let a checkpoint be read. Retryable, and counted: to start at step 0 instead would lose the training."""

    exit_code: ClassVar = CRASHED  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose manifest and digests hold."""

    folder: Path
    manifest: Manifest

    @property
    def of(self) -> str:
        """Whose it is, for messages."""
        return f"job {self.manifest.job}, step {self.manifest.step},"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a look at the folder found."""

    checkpoint: Checkpoint | None = None
    """The newest one that holds."""
    skipped: tuple[str, ...] = ()
    """Newer ones that do not hold, each with the reason."""
    start: Checkpoint | None = None
    """Another job's, whose model is what this job starts with at step 0 (origin.py)."""

    def describe(self, config: JobConfig) -> str | None:
        """Where the job begins, and what is remarkable about it; None when nothing is."""
        if self.checkpoint is None:
            start = self.start.manifest.resumed if self.start else None
            none = "Begins at step 0: no checkpoint in its folder can be used"
            skipped = f"{none}: {resuming.listed(self.skipped)}" if self.skipped else None
            return "; ".join(filter(None, (skipped, start)))[:_LONGEST] or None
        manifest = self.checkpoint.manifest
        if manifest.attempt == config.attempt and not self.skipped:
            return manifest.resumed
        text = f"Resumed at step {manifest.step}"
        if changed := resuming.changes(manifest.record, resuming.record_of(config)):
            text += f"; changed: {resuming.listed(changed)}"
        return (text + (f"; skipped: {resuming.listed(self.skipped)}" if self.skipped else ""))[:_LONGEST]


def name_of(step: int) -> str:
    """The name of a step's folder. Names sort as the steps do up to 10^8 of them: where it matters, numbers are compared."""
    return f"{PREFIX}{step:08d}"


def step_of(name: str) -> int:
    """The step of a folder's name."""
    return int(name.removeprefix(PREFIX))


def shard_of(server: int) -> str:
    """How the name of a parameter server's file begins."""
    return f"{SHARD}{server}-"


def newest(root: Path, config: JobConfig, data: DataSet | None = None) -> Found:
    """The newest valid checkpoint; says in the log which ones it skipped, and why.

    data: the job's data set, once it is known. Raises WrongInput when a checkpoint in the folder is of another training, Unreadable
    when the volume cannot be read.
    """
    candidates: list[tuple[Path, Manifest]] = []
    skipped: list[tuple[Path, str]] = []
    try:
        for folder in folders(root):
            try:
                candidates.append((folder, _fitting(folder, config, data)))
            except ValueError as error:
                skipped.append((folder, str(error)))
        checkpoint = None
        for folder, manifest in candidates:
            try:
                verify(folder, manifest)
            except ValueError as error:
                skipped.append((folder, str(error)))
                continue
            checkpoint = Checkpoint(folder=folder, manifest=manifest.for_job(config))
            break
    except OSError as error:
        raise Unreadable(f"the checkpoints in {root} cannot be read: {error}") from None
    newer = [
        (folder, why) for folder, why in skipped if checkpoint is None or _step_of(folder) > checkpoint.manifest.step
    ]
    for folder, why in newer:
        log.warning("checkpoint %s is skipped: %s", folder.name, why)
    if checkpoint is not None:
        log.info("the newest valid checkpoint is %s", checkpoint.folder.name)
    return Found(checkpoint=checkpoint, skipped=tuple(f"{folder.name} ({why})" for folder, why in newer))


def prepare(root: Path, step: int) -> Path:
    """The folder for a new checkpoint of this step. One that is there already stays until the new manifest replaces its own.

    It is durable once the checkpoint is published: steps of synchronous servers wait for this call. Raises OSError.
    """
    folder = root / name_of(step)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(
    folder: Path,
    *,
    config: JobConfig,
    step: int,
    parts: int,
    data: DataSet,
    files: dict[str, str],
    finished: bool = False,
    evaluation: dict[str, float] | None = None,
    model: ProgressModel | None = None,
    resumed: str | None = None,
    course: Course | None = None,
) -> Manifest:
    """Makes a checkpoint of a folder whose files are written, by writing its manifest.

    Raises OSError, and WrongInput when the folder is a checkpoint of another training.
    """
    try:
        tensors = index_of(folder, files)
    except ValueError as error:
        raise OSError(f"what was just written cannot be read: {error}") from None
    state, numbering = resuming.state_of(config), resuming.data_of(config, data)
    _refuse_to_replace_another(folder, config, data)
    manifest = Manifest(
        job=config.name,
        namespace=config.namespace,
        attempt=config.attempt,
        step=step,
        parts=parts,
        parts_per_step=config.parts_per_step,
        steps_per_epoch=steps_per_epoch(data.samples, config.trainer.batch_size, config.trainer.last_batch),
        files=files,
        state=state,
        data=numbering,
        record=resuming.record_of(config),
        resumed=resumed,
        time=datetime.now(UTC),
        finished=finished,
        evaluation=evaluation,
        course=course or Course(),
        model=model,
        tensors=tensors,
    )
    write_manifest(folder, manifest)
    atomic.sync_folder(folder.parent)  # or a power cut could take the folder with all that is durable in it
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a folder whose files are there. Raises OSError."""
    atomic.write(folder / NAME, lambda sink: sink.write(manifest.text().encode()))


def amend(folder: Path, course: Course) -> None:
    """Writes the course, with the evaluation if it is of this step, into the manifest of a checkpoint. Raises OSError, and ValueError when
    there is no manifest that can be read."""
    manifest = manifest_of(folder)
    evaluation = course.evaluation if course.evaluated == manifest.step else manifest.evaluation
    write_manifest(folder, manifest.model_copy(update={"course": course, "evaluation": evaluation}))


def best(root: Path, keep_best: KeepBest, *, up_to: int | None = None) -> tuple[int, float] | None:
    """The step of the checkpoint whose evaluation is the best, the earliest of equal ones, and its value; None while none is evaluated.

    up_to: the newest step that counts. Raises OSError.
    """
    found: tuple[int, float] | None = None
    for folder in reversed(folders(root)):
        if up_to is not None and _step_of(folder) > up_to:
            break
        try:
            manifest = Manifest.read((folder / NAME).read_text())
        except (FileNotFoundError, ValueError, OtherFormat):
            continue
        value = (manifest.evaluation or {}).get(keep_best.metric)
        if value is not None and is_better(value, found[1] if found is not None else None, keep_best.mode):
            found = manifest.step, value
    return found


def folders(root: Path) -> list[Path]:
    """The folders of all steps, newest first."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted((root / name for name in names if _STEP.fullmatch(name)), key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return step_of(folder.name)


def _refuse_to_replace_another(folder: Path, config: JobConfig, data: DataSet) -> None:
    try:
        _fitting(folder, config, data)
    except ValueError as error:
        if (folder / NAME).exists():
            log.warning("%s is damaged and will be replaced: %s", folder.name, error)


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a folder. Raises ValueError when there is none that can be read, WrongInput for one of another format."""
    try:
        return Manifest.read((folder / NAME).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"it has no {NAME}: it was not completed") from None
    except IsADirectoryError:
        raise ValueError(f"{NAME} is damaged: it is a folder") from None
    except ValidationError as error:
        raise ValueError(f"{NAME} is damaged: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{NAME} is damaged: {error}") from None
    except OtherFormat as error:
        raise WrongInput(
            f"checkpoint {folder.name} was written by {error}; go on with that version. Nothing in {folder.parent} was changed"
        ) from None


def _fitting(folder: Path, config: JobConfig, data: DataSet | None) -> Manifest:
    """The manifest of a folder. Raises ValueError when there is none that can be read, WrongInput when it is of another training."""
    manifest = manifest_of(folder)
    problem = resuming.misfit(manifest.state, resuming.state_of(config), free=resuming.CUT if manifest.tensors else ())
    problem = problem or resuming.misfit(manifest.data, resuming.data_of(config, data))
    if problem:
        raise WrongInput(another_training(manifest, problem))
    return manifest


def another_training(manifest: Manifest, problem: str) -> str:
    """What is said when a job cannot go on from a checkpoint that is in its folder."""
    checkpoint = f"checkpoint {name_of(manifest.step)}"
    if manifest.taken is not None:
        return (
            f"checkpoint.from: {checkpoint}, which this job has taken over, is of another training: {problem}. With include: All the "
            "training goes on as that job would have: write the same, or take its model alone (include: Model), in a new job (a local "
            "run: without --resume)"
        )
    go_on = (
        "Another version of the trainer wrote it: go on with that one"
        if problem.startswith(resuming.ORDER)
        else "This is immutable once a job has checkpoints: change it back to go on"
    )
    return (
        f"{checkpoint} is of another training: {problem}. {go_on}, or train it as a new job (a local run: without --resume). "
        "No checkpoint was changed"
    )


def verify(folder: Path, manifest: Manifest) -> None:
    """Raises ValueError when a file is not what the manifest says."""
    for name, expected in manifest.files.items():
        try:
            actual = digests.of(folder / name, like=expected)
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        except IsADirectoryError:
            raise ValueError(f"{name} is damaged: it is a folder") from None
        except ValueError as error:
            raise ValueError(f"{name} is damaged: {error}") from None
        if actual != expected:
            raise ValueError(f"{name} is damaged: its digest is {actual}, the manifest says {expected}")
