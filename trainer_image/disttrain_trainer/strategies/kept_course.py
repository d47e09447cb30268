"""What rank 0 keeps of the course of the training with the checkpoints that are there (docs/design/0020)."""

from pathlib import Path

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import retention, store
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import NAME, Manifest
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)


class KeptCourse:
    """Of the checkpoints in one folder. For one thread, while no checkpoint is being written."""

    def __init__(self, root: Path, config: JobConfig, control: ControlClient) -> None:
        self._root = root
        self._control = control
        self._keep_best = config.checkpoint.keep_best if config.checkpoint is not None else None
        self._roll_back_seconds = config.roll_back_seconds

    def prune(self, published: Path, manifest: Manifest, *, keep: int) -> None:
        """A checkpoint was published: removes those that need not stay, `keep` of the newest and what retention.py names beside them."""
        seconds = self._roll_back_seconds
        retention.prune(published, manifest, keep=keep, keep_best=self._keep_best, roll_back_seconds=seconds)

    def best(self) -> dict[str, object]:
        """The field of SAVED that names the best checkpoint. Raises OSError."""
        found = store.best(self._root, self._keep_best) if self._keep_best is not None else None
        return {} if found is None else {"best": found}

    def keep(self, course: Course) -> None:
        """Keeps what an evaluation found with the checkpoint of its step, if there is one, and tells the master the best checkpoint."""
        folder = self._root / store.name_of(course.evaluated)
        try:
            if (folder / NAME).exists():
                store.amend(folder, course)
                self._control.send(MessageType.SAVED, **self.best())
        except (OSError, ValueError) as error:
            log.error("%s does not get its evaluation: %s", folder.name, error)

    def keep_left_out(self, step: int, course: Course) -> None:
        """Keeps with the checkpoint that the training went back to which parts are left out after it."""
        folder = self._root / store.name_of(step)
        try:
            if (folder / NAME).exists():
                store.amend(folder, course)
        except (OSError, ValueError) as error:
            log.error("%s does not name the parts that are left out: %s", folder.name, error)
