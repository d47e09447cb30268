"""Members that drain with parameter servers: a checkpoint is made as soon as possible, then they are released. Pure."""

from collections.abc import Callable

from disttrain_trainer.coordinator.checkpoints import CheckpointCoordinator
from disttrain_trainer.coordinator.draining import DrainingMembers
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.net.peers import Sender


class ServedDraining(DrainingMembers):
    """See DrainingMembers."""

    def __init__(
        self,
        sender: Sender,
        *,
        checkpoints: CheckpointCoordinator | None,
        queue: Callable[[], WorkQueue | None],
        tracker: Tracker,
    ) -> None:
        """queue: that of the round; None between two rounds and once the training has ended, when there is nothing to save."""
        super().__init__(sender)
        self._checkpoints = checkpoints
        self._queue = queue
        self._tracker = tracker

    def save_soon(self, now: float) -> bool:
        """Asks for a checkpoint after the steps in work. False when there is none to wait for: the members are released."""
        checkpoints, queue = self._checkpoints, self._queue()
        saves = checkpoints is not None and queue is not None and not self._tracker.nan_loss
        if checkpoints is None or queue is None or not (saves and (checkpoints.busy or checkpoints.misses(queue))):
            self.release()
            return False
        checkpoints.hurry(queue, now)
        return True

    def saved(self) -> None:
        """A checkpoint is complete, or was abandoned: the members are released, unless steps were done since that another one keeps."""
        checkpoints, queue = self._checkpoints, self._queue()
        if checkpoints is None or queue is None or not checkpoints.must_follow(queue):
            self.release()

    def release(self) -> None:
        super().release()
        if self._checkpoints is None:
            return
        self._checkpoints.hurrying = False
        if (queue := self._queue()) is not None:
            self._checkpoints.raise_limit(queue)  # no process waits any more for the steps in work to be whole
