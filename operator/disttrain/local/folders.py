"""Where a local run keeps things: `.disttrain/` in the current folder.

    .disttrain/
      runs/<job>-<time>-<uid>/       one run: job.json (the final DistTrainJob), logs/, termination/, config/ (its ConfigMaps),
                                     tls/ (the certificate of the attempt that runs)
      claims/<claim>/                a PersistentVolumeClaim, shared by all runs as it is on a cluster
      claims/<claim>/<run>/          the checkpoints of one run

A run is a new job with a uid of its own and starts at step 0: it never moves or overwrites the checkpoints of another one, and reads them
only for checkpoint.from, by the names of these folders (api.names.uid_in_folder).
`--resume` goes on with the newest run of that name instead: the same uid, the same folder, the next attempt. Not here: what is in
the files of a checkpoint (the trainer's), which run a name stands for (runs.py).
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from disttrain.api.job import DistTrainJob
from disttrain.local.runs import ROOT, runs_of


class _State(BaseModel):
    """What `run.json` holds."""

    uid: uuid.UUID
    attempt: int


class NothingToResume(Exception):
    """`--resume` found no run that it could go on with; the text says why."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, locked while the run goes on."""

    root: Path
    path: Path
    uid: str
    attempt: int
    _lock: int
    former: DistTrainJob | None = None
    """The job as the attempt before left it; None for a new run."""

    @classmethod
    def new(cls, job_name: str, root: Path = ROOT) -> Self:
        """A folder for a new run. Raises OSError, and then leaves nothing."""
        uid = str(uuid.uuid4())
        path = root / "runs" / f"{job_name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uid[:8]}"
        try:
            for part in ("logs", "termination", "config"):
                (path / part).mkdir(parents=True)
            (root / ".gitignore").write_text("*\n")
            folder = cls(root, path, uid, 1, _lock(path))
            folder.remember(attempt=1)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return folder

    @classmethod
    def resume(cls, job_name: str, root: Path = ROOT) -> Self:
        """The folder of the newest run of a job. Raises NothingToResume."""
        for path in runs_of(job_name, root):
            try:
                state = _State.model_validate_json((path / "run.json").read_text())
                lock = _lock(path)
            except BlockingIOError:
                raise NothingToResume(
                    f"the newest run of {job_name} still runs ({path}); end it first, or leave --resume out"
                ) from None
            except ValueError:
                raise NothingToResume(
                    f"{path / 'run.json'} is damaged, and with it the newest run of {job_name}: leave --resume out to start a new one; "
                    f"checkpoint.from: {job_name} gives it the model of the newest checkpoint"
                ) from None
            return cls(root, path, str(state.uid), state.attempt + 1, lock, stored_job(path))
        raise NothingToResume(f"there is no run of {job_name} in {root / 'runs'}; leave --resume out to start one")

    def remember(self, attempt: int) -> None:
        """Writes down what `--resume` needs."""
        replace_json(self.path / "run.json", {"uid": self.uid, "attempt": attempt})

    def keep(self, job: DistTrainJob) -> None:
        """Writes the job, status and all."""
        replace_json(self.path / "job.json", job.to_dict())

    def log(self, label: str) -> Path:
        """The log of a replica and of its successors."""
        return self.path / "logs" / f"{label}.log"

    def termination_message(self, label: str, uid: str) -> Path:
        """Where a process leaves its termination message."""
        return self.path / "termination" / f"{label}-{uid[:8]}.json"

    def tls(self, attempt: int) -> Path:
        """The folder of an attempt's certificate."""
        return self.path / "tls" / str(attempt)

    def keep_secret(self, folder: Path, files: Mapping[str, bytes]) -> None:
        """Writes files that no other user of the machine may read; those beside their folder are of older attempts, and go."""
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        for name, content in files.items():
            with open(folder / name, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(content)

    def add_secret(self, folder: Path, name: str, content: bytes) -> None:
        """Writes one more file there."""
        with open(folder / name, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(content)

    def copies(self, worker: int) -> Path:
        """What stands for the disk of a worker's node: its copies of the data."""
        return self.path / "copies" / f"worker-{worker}"

    def forget_copies(self) -> None:
        """Removes them: no process of the run is left, and the claim has the data."""
        shutil.rmtree(self.path / "copies", ignore_errors=True)

    def forget_secrets(self) -> None:
        """Removes the certificates: no process of the run is left."""
        shutil.rmtree(self.path / "tls", ignore_errors=True)

    def config(self, name: str) -> Path:
        """The folder of a ConfigMap of the file."""
        return self.path / "config" / name

    def claim(self, name: str) -> Path:
        """The folder that stands for a PersistentVolumeClaim; made when it is not there."""
        path = self.root / "claims" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def checkpoints(self, claim: str) -> Path:
        """Where this run keeps its checkpoints within a claim."""
        path = self.claim(claim) / self.path.name
        path.mkdir(exist_ok=True)
        return path

    def discard(self) -> None:
        """Removes the folder of a run that never began, so that `--resume` does not find it."""
        if self.attempt == 1:
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the lock."""
        os.close(self._lock)


def stored_job(path: Path) -> DistTrainJob | None:
    """The job of a run's folder; None where it cannot be read, as when another version wrote it."""
    try:
        return DistTrainJob.parse(json.loads((path / "job.json").read_text()))
    except (OSError, ValueError):
        return None


def _lock(path: Path) -> int:
    """Raises BlockingIOError when another process holds the lock."""
    descriptor = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def replace_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file, which others see whole: as it was, or as it is."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
