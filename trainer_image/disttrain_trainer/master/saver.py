"""One checkpoint of the parameter servers at a time: the folder, a file from each server, the manifest last.

Every step that blocks is the archive's, and answers later. A checkpoint that fails is said, and given up; the one before stays.
Pure. Not here: when a checkpoint is due (served.py), files (checkpoint/folder.py).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

from disttrain.api.runtime import ProgressCheckpoint
from disttrain_trainer.checkpoint.folder import name_of
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.data.slices import SliceSet
from disttrain_trainer.master.member import Archive
from disttrain_trainer.master.questions import Questions, slices_of
from disttrain_trainer.master.tracker import Tracker
from disttrain_trainer.messages import Message, Say

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Save:
    step: int
    final: bool
    files: dict[str, str] = field(default_factory=dict)
    applied: list[SliceSet] = field(default_factory=list)


class Saver:
    """Writes checkpoints. done: called when one is complete or given up, with whether it was the final one."""

    def __init__(
        self,
        *,
        questions: Questions,
        archive: Archive,
        tracker: Tracker,
        servers: int,
        done: Callable[[bool, float], None],
    ) -> None:
        self._questions = questions
        self._archive = archive
        self._tracker = tracker
        self._servers = servers
        self._done = done
        self._save: _Save | None = None
        self.newest: Manifest | None = None
        """The newest complete checkpoint."""
        self.attempted = 0
        """Step of the last one that was begun: one that failed is not tried again before the next is due."""

    @property
    def busy(self) -> bool:
        return self._save is not None

    def know(self, manifest: Manifest) -> None:
        """This is the newest complete checkpoint."""
        self.newest = manifest
        self._tracker.last_checkpoint = ProgressCheckpoint(step=manifest.step, time=manifest.time)

    def start(self, step: int, *, final: bool = False) -> None:
        """Begins a checkpoint; one that is being written must have ended."""
        self._save = _Save(step=step, final=final)
        self.attempted = step
        self._archive.prepare(step)

    def prepared(self, step: int, folder: str | None, now: float) -> None:
        """The archive's answer to `prepare`."""
        if self._save is None or self._save.step != step:
            return
        if folder is None:
            self._end(f"the folder of step {step} cannot be made", now)
        else:
            self._questions.tell(Say.SAVE, folder=folder)

    def server_saved(self, index: int, message: Message, now: float) -> None:
        """A server wrote its file, or could not."""
        save = self._save
        if save is None or message["folder"] != name_of(save.step):
            return
        if message.get("error"):
            self._end(f"parameter-server-{index}: {message['error']}", now)
            return
        save.files[f"shard-{index}.safetensors"] = message["sha256"]
        save.applied.append(slices_of(message))
        if len(save.files) == self._servers:
            slices = len(reduce(SliceSet.intersection, save.applied))
            self._archive.publish(step=save.step, slices=slices, files=save.files, finished=save.final)

    def published(self, manifest: Manifest | OSError, now: float) -> None:
        """The archive's answer to `publish`."""
        if isinstance(manifest, OSError):
            self._end(str(manifest), now)
        else:
            self.know(manifest)
            self._end(None, now)

    def abandon(self) -> None:
        """A server is lost: what it was to write will not come."""
        self._save = None

    def _end(self, error: str | None, now: float) -> None:
        save, self._save = self._save, None
        if error is not None:
            log.error("a checkpoint was not written: %s; the training goes on, the one before is intact", error)
        self._done(save is not None and save.final, now)
