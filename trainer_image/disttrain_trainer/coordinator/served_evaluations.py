"""Evaluations between two steps with parameter servers: one worker evaluates, the others train on. Pure; the sender sends.

| | Sync | Async, BoundedStaleness |
|---|---|---|
| due | when every part before the step is applied; later parts are not assigned before | when so many steps are done |
| of which parameters | exactly those of the step | those that the worker pulls: of the step, or newer |
| the others | go on when the worker has them; with what may end the training (earlyStopping, hooks) they wait for the result | go on |
| at the end | the final evaluation comes after the last one between two steps | after the one that a worker makes |
| the worker is lost | another one, which has kept the parameters of the step; none has: the evaluation is left out | another one |

The worker returns to the queue of parts when it has evaluated: it holds none meanwhile, so that no step waits for it.
"""

from collections.abc import Callable

from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.coordinator.job_course import JobCourse
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.coordinator.workers import Workers
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member, Sender
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)


class ServedEvaluations(JobCourse):
    """The evaluations of one master, and the course of the training, which they decide."""

    def __init__(
        self,
        *,
        sender: Sender,
        workers: Workers,
        tracker: Tracker,
        config: JobConfig,
        changed: Callable[[Course], None],
    ) -> None:
        """changed: called with the course after an evaluation."""
        super().__init__(config=config, tracker=tracker)
        self._sender = sender
        self._workers = workers
        self._changed = changed
        self._every = config.trainer.evaluate_every_steps
        self._parts = config.parts_per_step
        self._sync = config.strategy.synchronous
        self._may_stop = config.trainer.early_stopping is not None or config.trainer.hooks is not None
        self._known: dict[int, tuple[int, Course]] = {}
        """What the workers said of the course, and of which round it was."""
        self.evaluator: int | None = None
        """The worker that evaluates, or is to evaluate when its parts are done."""
        self._asked = self._has_begun = False
        self._lacking: set[int] = set()
        """Workers that have not the parameters of the step."""

    @property
    def evaluating(self) -> int | None:
        """The worker that was asked to evaluate, and has not answered: it holds no part."""
        return self.evaluator if self._asked else None

    def begin(self, course: Course, queue: WorkQueue, *, round_number: int) -> None:
        """A round begins, or a new master takes one over. course: that of the state which the round began from."""
        stored = course
        for of_round, known in self._known.values():
            if of_round == round_number and known.evaluated > course.evaluated:
                course = known
        for known in (self.course, *(known for _, known in self._known.values())):
            course = course.merged(known)
        self.reset()
        self.course = self._from_here(course, queue)
        self._show()
        self._hold(queue)
        if course.left_out != stored.left_out:
            self._changed(course)

    def _from_here(self, course: Course, queue: WorkQueue) -> Course:
        """Sync: evaluations that lie so far back that no worker can have their parameters are passed over, as those before a checkpoint
        of a job that did not evaluate then. Workers are at most one evaluation ahead of the one that is made, and what one of them knows
        of the round must count as newer (`know`)."""
        if not (self._every and self._sync):
            return course
        passed = (-(-queue.step // self._every) - 3) * self._every
        return course if passed <= course.evaluated else course.model_copy(update={"evaluated": passed})

    def know(self, rank: int, message: Message, queue: WorkQueue | None, *, round_number: int) -> None:
        """A worker is ready, and says which course it knows."""
        if message.get("course") is None:
            return
        of_round, course = int(message.get("generation") or 0), Course.model_validate(message["course"])
        self._known[rank] = of_round, course
        if queue is None:
            return
        if of_round == round_number and course.evaluated > self.course.evaluated:
            self.begin(course, queue, round_number=round_number)
        elif (merged := self.course.merged(course)) != self.course:
            # The round was open before this worker came to a new master: what the one before had left out stays left out.
            self.course = merged
            self._show()
            self._announce()

    def reset(self) -> None:
        """The round is lost."""
        self._dismiss(None)
        self._lacking.clear()

    def worker_left(self, rank: int, queue: WorkQueue | None) -> None:
        """A worker is lost, or starts over: if it was to evaluate, the next `advance` asks another one."""
        self._known.pop(rank, None)
        self._lacking.discard(rank)
        if rank == self.evaluator:
            self._dismiss(None)
            if queue is not None:
                self._hold(queue)

    def is_pending(self, queue: WorkQueue) -> bool:
        """Whether a worker evaluates, or is to evaluate."""
        return self._asked or self._is_due(queue)

    def advance(self, queue: WorkQueue) -> None:
        """Asks a worker to evaluate, when that is due."""
        if not self._is_due(queue) or self._asked or (self._sync and queue.done < queue.evaluation_limit):
            return
        if self.evaluator is None:
            ready = [rank for rank in self._workers.ready if rank not in self._lacking]
            if not ready and self._lacking and self._workers.ready:
                log.warning("the evaluation of step %d is left out: no worker has its parameters any more", self._due)
                self._decide(self.course.after(self._due, None, self._config), queue)
                return
            if not ready:
                return
            self.evaluator = self._workers.paused = ready[-1]
        if queue.holds(self.evaluator):
            return
        queue.leave(self.evaluator)
        self._asked = True
        self._workers.evaluate(self.evaluator, self._due)

    def evaluated(self, rank: int, message: Message, queue: WorkQueue | None) -> bool:
        """The worker has the parameters (begun), has not those of the step (missing), or has evaluated. False when it was not asked."""
        if rank != self.evaluator or queue is None or not self._asked or not self._workers.holds_lease(rank, message):
            return False
        if message.get("begun"):
            self._has_begun = True
            self._hold(queue)
            return True
        if message.get("missing"):
            self._lacking.add(rank)
            self._dismiss(queue)
            self._hold(queue)
            return True
        step = self._due if self._sync else max(self._due, int(message["step"]))
        self._dismiss(queue)
        stop = message.get("stop")
        self._decide(self.course.after(step, message["evaluation"], self._config, stop=stop), queue)
        return True

    @property
    def _due(self) -> int:
        """The step of the next evaluation."""
        return (self.course.evaluated // self._every + 1) * self._every

    def _is_due(self, queue: WorkQueue) -> bool:
        if not self._every or self.course.stopped is not None or self._due * self._parts >= queue.total:
            return False
        # Async: at the end the final evaluation is of the same parameters.
        return queue.step >= self._due and (self._sync or not queue.finished)

    def _decide(self, course: Course, queue: WorkQueue) -> None:
        self._lacking.clear()
        self.course = course
        self._show()
        if course.stopped is not None:
            log.info("the training ends after the evaluation of step %d: %s", course.evaluated, course.stopped)
        self._hold(queue)
        self._announce()

    def _announce(self) -> None:
        """The course has changed: the workers and the newest checkpoint get it."""
        for rank in self._workers.live:
            self._sender.send(Member(Role.WORKER, rank), MessageType.COURSE, course=self.course.model_dump())
        self._changed(self.course)

    def _hold(self, queue: WorkQueue) -> None:
        """Sets the part from which on none is assigned yet."""
        handed_out = -(-queue.handed_out // self._parts)
        if self.course.stopped is not None:
            queue.total = min(queue.total, max(self.course.evaluated, handed_out) * self._parts)
        if not self._every or not self._sync or self.course.stopped is not None:
            queue.evaluation_limit = queue.total
        elif self._has_begun and not self._may_stop:
            queue.evaluation_limit = (self._due + self._every) * self._parts
        else:
            queue.evaluation_limit = max(self._due, handed_out) * self._parts

    def _dismiss(self, queue: WorkQueue | None) -> None:
        """The evaluator evaluates no longer. queue: to which it returns."""
        rank, self.evaluator, self._workers.paused = self.evaluator, None, None
        if queue is not None and rank is not None and self._asked:
            queue.join(rank)
        self._asked = self._has_begun = False
