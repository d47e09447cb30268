"""The checkpoint folder of a job: which checkpoints are whole, and how one becomes whole.

step-00001200/ holds files, each written under another name and renamed, and the manifest, written last: a folder without a manifest
is no checkpoint, whatever else is in it. No two saves share the name of a file, so that one which was given up, and of which somebody
may still be writing, changes nothing that a manifest names. Works on any file system that several pods can mount.
Not here: what is in the files.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint.manifest import NAME, Manifest, configuration, difference, digest

log = logging.getLogger(__name__)

PREFIX = "step-"
STATE = "state-"
"""How the name of the file of a collective world begins: model and optimiser."""
BUFFERS = "buffers-"
"""How the name of the file with a worker's buffers begins, where parameter servers save the rest."""
_STEP = re.compile(rf"{PREFIX}(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose manifest and digests hold."""

    folder: Path
    manifest: Manifest


def name_of(step: int) -> str:
    """The name of a step's folder. Names sort as the steps do up to 10^8 of them: where it matters, numbers are compared."""
    return f"{PREFIX}{step:08d}"


def shard_of(server: int) -> str:
    """How the name of a parameter server's file begins."""
    return f"shard-{server}-"


def newest(root: Path, config: JobConfig) -> Checkpoint | None:
    """The newest valid checkpoint of this configuration; says in the log which ones it skipped, and why."""
    for folder in _folders(root):
        try:
            checkpoint = Checkpoint(folder=folder, manifest=_verified(folder, config).for_job(config))
        except (OSError, ValueError) as error:
            log.warning("checkpoint %s is skipped: %s", folder.name, error)
            continue
        log.info("the newest valid checkpoint is %s", folder.name)
        return checkpoint
    return None


def prepare(root: Path, step: int) -> Path:
    """The folder for a new checkpoint of this step. One that is there already stays until the new manifest replaces its own.

    Raises OSError.
    """
    folder = root / name_of(step)
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(root)  # or a power cut could take the folder with all that is durable in it
    return folder


def publish(
    folder: Path,
    *,
    config: JobConfig,
    step: int,
    slices: int,
    steps_per_epoch: int,
    files: dict[str, str],
    finished: bool = False,
    evaluation: dict[str, float] | None = None,
) -> Manifest:
    """Makes a checkpoint of a folder whose files are written, by writing its manifest. Raises OSError."""
    configured = configuration(config)
    ours = digest(configured)
    if (replaced := _digest_in(folder)) not in (None, ours):
        what = "another configuration" if replaced else "nobody knows what"
        log.warning("%s was a checkpoint of %s; this job's takes its place", folder.name, what)
    manifest = Manifest(
        job=config.name,
        attempt=config.attempt,
        step=step,
        slices=slices,
        steps_per_epoch=steps_per_epoch,
        files=files,
        seed=config.trainer.seed,
        configuration=configured,
        digest=ours,
        time=datetime.now(UTC),
        finished=finished,
        evaluation=evaluation,
    )
    write_atomically(folder / NAME, lambda path: path.write_text(manifest.model_dump_json(indent=1)))
    return manifest


def prune(published: Path, manifest: Manifest, *, keep: int) -> None:
    """After a checkpoint was published: it and the ones before it stay, `keep` in all; what older saves left behind goes.

    Others of the same configuration that are of a later step stay, too: they did not hold, or the training would have gone on from them,
    so they neither count nor push a good one out. So do all checkpoints of other configurations: somebody may go back to one.
    What cannot be removed is said: the checkpoint is complete all the same.
    """
    kept = 0
    for folder in _folders(published.parent):
        of = _digest_in(folder)
        if _step_of(folder) > manifest.step or of not in (None, manifest.digest):
            continue
        try:
            if of is not None and kept < keep:
                kept += 1
                _tidy(folder)
            else:
                # The manifest first: an interrupted removal must not leave a checkpoint that seems whole.
                (folder / NAME).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            log.warning("what is left of %s stays: %s", folder.name, error)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` write a temporary file, and puts it at `path`, on the disk, in one step. Raises OSError; then `path` is as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Puts the folder's entries on the disk; without it a rename may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folders(root: Path) -> list[Path]:
    """The folders of all steps, newest first."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted((root / name for name in names if _STEP.fullmatch(name)), key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def _digest_in(folder: Path) -> str | None:
    """Of which configuration a folder is a checkpoint; "" when its manifest cannot be read, None when it is no checkpoint."""
    try:
        return Manifest.model_validate_json((folder / NAME).read_text()).digest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return ""


def _tidy(folder: Path) -> None:
    """Removes what the manifest does not name: an earlier checkpoint of the same step, and saves that were given up."""
    named = Manifest.model_validate_json((folder / NAME).read_text()).files
    for path in folder.iterdir():
        if path.name != NAME and path.name not in named:
            path.unlink(missing_ok=True)


def _verified(folder: Path, config: JobConfig) -> Manifest:
    """The manifest of a folder, when all that it says holds. Raises OSError or ValueError, which says what does not."""
    try:
        manifest = Manifest.model_validate_json((folder / NAME).read_text())
    except FileNotFoundError:
        raise ValueError(f"it has no {NAME}: it was not completed") from None
    except ValidationError as error:
        raise ValueError(f"{NAME} is damaged: {error.errors()[0]['msg']}") from None
    configured = configuration(config)
    if manifest.digest != digest(configured):
        found = difference(manifest.configuration, configured) or "the configuration's digest does not match"
        raise ValueError(f"it is of another configuration: {found}")
    for name, expected in manifest.files.items():
        try:
            actual = sha256_of(folder / name)
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        if actual != expected:
            raise ValueError(f"{name} is damaged: its sha256 is {actual[:12]}…, the manifest says {expected[:12]}…")
    return manifest
