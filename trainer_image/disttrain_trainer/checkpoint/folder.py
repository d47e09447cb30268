"""The checkpoint folder of a job: which checkpoints are whole, and how one becomes whole.

step-00001200/ holds files, each written under another name and renamed, and the manifest, written last: a folder without a manifest
is no checkpoint, whatever else is in it. Works on any file system that several pods can mount. Not here: what is in the files.
"""

import hashlib
import logging
import os
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
BUFFERS = "buffers-"
"""How the name of the file with a worker's buffers begins, where parameter servers save the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose manifest and digests hold."""

    folder: Path
    manifest: Manifest


def name_of(step: int) -> str:
    """The name of a step's folder; names sort as the steps do."""
    return f"{PREFIX}{step:08d}"


def newest(root: Path, config: JobConfig) -> Checkpoint | None:
    """The newest valid checkpoint of this configuration; says in the log which ones it skipped, and why."""
    for folder in _folders(root):
        try:
            checkpoint = Checkpoint(folder=folder, manifest=_verified(folder, config))
        except (OSError, ValueError) as error:
            log.warning("checkpoint %s is skipped: %s", folder.name, error)
            continue
        log.info("the newest valid checkpoint is %s", folder.name)
        return checkpoint
    return None


def prepare(root: Path, step: int) -> Path:
    """The folder for a new checkpoint of this step. What was there is no checkpoint from now on. Raises OSError."""
    folder = root / name_of(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).unlink(missing_ok=True)
    return folder


def publish(
    folder: Path,
    *,
    config: JobConfig,
    step: int,
    slices: int,
    files: dict[str, str],
    finished: bool = False,
    evaluation: dict[str, float] | None = None,
) -> Manifest:
    """Makes a checkpoint of a folder whose files are written, by writing its manifest. Raises OSError."""
    configured = configuration(config)
    manifest = Manifest(
        job=config.name,
        attempt=config.attempt,
        step=step,
        slices=slices,
        files=files,
        seed=config.trainer.seed,
        configuration=configured,
        digest=digest(configured),
        time=datetime.now(UTC),
        finished=finished,
        evaluation=evaluation,
    )
    write_atomically(folder / NAME, lambda path: path.write_text(manifest.model_dump_json(indent=1)))
    return manifest


def prune(root: Path, *, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and unfinished folders that are older than the newest."""
    whole = [folder for folder in _folders(root) if (folder / NAME).exists()]
    for folder in _folders(root):
        if whole and folder not in whole[:keep] and folder.name < whole[0].name:
            # The manifest first: an interrupted removal must not leave a checkpoint that seems whole.
            (folder / NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


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
    return [root / name for name in sorted(names, reverse=True) if name.startswith(PREFIX)]


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
