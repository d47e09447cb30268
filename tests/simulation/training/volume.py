"""The checkpoint volume: checkpoint/store.py in memory. A shard's file is the set of parts that its tensors are made of."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import resuming
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.store import name_of
from disttrain_trainer.data.index_set import IndexSet

_TIME = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """What a server writes."""

    version: int
    applied: IndexSet
    """What the file says that it holds."""
    parts: int
    """What it holds: a bit for each part in the parameters."""

    @property
    def digest(self) -> str:
        return f"{self.version}-{self.parts:x}"


@dataclass(slots=True)
class Folder:
    """A step's folder."""

    files: dict[str, ShardFile | None] = field(default_factory=dict)
    """None: a worker's buffers."""
    manifest: Manifest | None = None


class Volume:
    """The folders of all steps."""

    def __init__(self) -> None:
        self.folders: dict[str, Folder] = {}

    @property
    def newest(self) -> Manifest | None:
        """The newest complete checkpoint, as store.newest finds it."""
        for name in sorted(self.folders, reverse=True):
            folder = self.folders[name]
            if folder.manifest is not None and all(file in folder.files for file in folder.manifest.files):
                return folder.manifest
        return None

    def prepare(self, step: int) -> str:
        self.folders.setdefault(name_of(step), Folder())
        return name_of(step)

    def write(self, folder: str, name: str, file: ShardFile | None) -> None:
        """Raises OSError when the folder was removed."""
        if folder not in self.folders:
            raise FileNotFoundError(folder)
        self.folders[folder].files[name] = file

    def read(self, path: str) -> ShardFile | None:
        folder, name = path.split("/")
        return self.folders[folder].files[name]

    def publish(
        self, config: JobConfig, *, step: int, parts: int, files: dict[str, str], finished: bool, result: dict[str, Any]
    ) -> Manifest:
        """store.publish and store.prune. result: evaluation and model. Raises OSError when the folder was removed."""
        folder = self.folders.get(name_of(step))
        if folder is None:
            raise FileNotFoundError(name_of(step))
        folder.manifest = Manifest.model_construct(
            job=config.name, attempt=1, step=step, parts=parts, parts_per_step=config.parts_per_step, steps_per_epoch=10,
            files=dict(files), state=resuming.state_of(config), data={}, time=_TIME, finished=finished, **result,
        )  # fmt: skip
        self._prune(step, folder.manifest, keep=config.checkpoint.keep if config.checkpoint else 1)
        return folder.manifest

    def amend(self, course: Course) -> None:
        """CheckpointFolder.amend."""
        for folder in self.folders.values():
            if folder.manifest is not None and folder.manifest.step >= course.evaluated:
                folder.manifest = folder.manifest.model_copy(update={"course": course})

    def _prune(self, step: int, manifest: Manifest, *, keep: int) -> None:
        kept = 0
        for name in sorted(self.folders, reverse=True):
            folder = self.folders[name]
            if name > name_of(step):
                continue
            if folder.manifest is None or kept == keep:
                del self.folders[name]
            else:
                kept += 1
                folder.files = {file: held for file, held in folder.files.items() if file in folder.manifest.files}
