"""The end of a training with parameter servers: from the part that was counted last to the last checkpoint.

Every part was said to be applied; the servers, who know, confirm it; an evaluation of an earlier step ends; a worker evaluates the
final parameters and writes the model; they are saved.
A worker or server that is lost meanwhile has its part asked again. Pure.
"""

from collections.abc import Callable

from disttrain.api.names import Role
from disttrain.api.runtime import ProgressModel
from disttrain_trainer.coordinator.checkpoints import CheckpointCoordinator
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.servers import Servers
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.coordinator.workers import Workers
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member, Sender
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)


class Completion:
    """How a training ends.

    checkpoints: None without a checkpoint volume. evaluates: the job has an evaluation.
    evaluates_earlier_step: whether a worker evaluates, or is to evaluate, the parameters of a step before the last one.
    finish: called when all is done and there is no checkpoint to write; with checkpoints, the last one is the end.
    """

    def __init__(
        self,
        *,
        sender: Sender,
        servers: Servers,
        workers: Workers,
        tracker: Tracker,
        checkpoints: CheckpointCoordinator | None,
        evaluates: bool,
        evaluates_earlier_step: Callable[[WorkQueue], bool],
        finish: Callable[[float], None],
    ) -> None:
        self._sender = sender
        self._servers = servers
        self._workers = workers
        self._tracker = tracker
        self._checkpoints = checkpoints
        self._evaluates = evaluates
        self._evaluates_earlier_step = evaluates_earlier_step
        self._finish = finish
        self._confirming = False
        self._step = 0
        """Of the parameters that are evaluated."""
        self.confirmed = False
        """Every part is applied on every server."""
        self.evaluator: int | None = None
        """The worker that evaluates; it handles no other message before it has answered. None when there is none."""

    def reset(self) -> None:
        """The round is lost, and with it the final parameters."""
        self.confirmed = self._confirming = False
        self.evaluator = self._tracker.evaluation = self._tracker.evaluation_step = self._tracker.model = None

    def drop_questions(self) -> None:
        """A server is lost, and will not answer."""
        self._confirming = False

    def worker_left(self, rank: int) -> None:
        """A worker is lost, or starts over: if it was the evaluator, the next `advance` asks another one."""
        if self.evaluator == rank:
            self.evaluator = None

    def evaluated(self, rank: int, message: Message) -> bool:
        """A worker evaluated and wrote the model; False when it was not asked, or did so of a round that is lost."""
        if rank != self.evaluator or not self._workers.holds_lease(rank, message):
            return False
        if message.get("evaluation") is None and message.get("model") is None:
            return False
        self._tracker.evaluation, self._tracker.evaluation_step = message.get("evaluation"), self._step
        model = message.get("model")
        self._tracker.model = None if model is None else ProgressModel.model_validate(model)
        self.evaluator = None
        return True

    def advance(self, queue: WorkQueue, now: float) -> None:
        """Takes the next step of the completion. Call it when every part is counted and every server is connected."""
        if self.confirmed:
            self._conclude(queue, now)
        elif not self._confirming:
            self._confirm(queue, now)

    def _confirm(self, queue: WorkQueue, now: float) -> None:
        """The workers reported every part as applied: asks the servers, which know."""
        self._confirming = True

        def then(applied: IndexSet) -> None:
            self._confirming = False
            gone = queue.unlearn(applied)
            if gone:
                log.warning(
                    "%d parts were counted, but are not applied on every server; they are done again", len(gone)
                )
            else:
                self.confirmed = True

        self._servers.ask(MessageType.STATE, then, now)

    def _conclude(self, queue: WorkQueue, now: float) -> None:
        """All is applied: evaluate, write the model, save, finish. The servers themselves save nothing that is not finite."""
        checkpoints = self._checkpoints
        if checkpoints is not None and checkpoints.busy:
            return
        tracker = self._tracker
        missing = self._evaluates and (tracker.evaluation is None or tracker.evaluation_step != queue.step)
        if missing or (self._workers.keep_model and self._tracker.model is None):
            ready = self._workers.ready
            if checkpoints is not None and checkpoints.owes(queue):
                # The evaluation may fail, which must not cost the training, or take longer than a member that drains has.
                checkpoints.start(queue.step, now)
            elif self.evaluator is None and ready and not self._evaluates_earlier_step(queue):
                self.evaluator = ready[0]
                self._step = queue.step
                ends_early = {} if queue.step == tracker.total_steps else {"step": queue.step}
                self._sender.send(Member(Role.WORKER, ready[0]), MessageType.EVALUATE, **ends_early)
        elif checkpoints is not None:
            checkpoints.start(queue.step, now, final=True)
        else:
            self._finish(now)
