"""The master's decisions about a training with parameter servers: what it sends when a member joins, sends a message or is lost.

Which parts are applied is the servers' state; the work queue only copies it. Workers may come and go. Pure: the caller gives the time, the
sender sends, and the checkpoint store does the files.
"""

from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain.api.trainer import ScriptLoop
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.coordinator import missing_members
from disttrain_trainer.coordinator.checkpoints import CheckpointCoordinator
from disttrain_trainer.coordinator.completion import Completion
from disttrain_trainer.coordinator.gradient_norms import GradientNorms
from disttrain_trainer.coordinator.hedging import Hedges
from disttrain_trainer.coordinator.missing_members import MissingMembers
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.rounds import Rounds
from disttrain_trainer.coordinator.served_draining import ServedDraining
from disttrain_trainer.coordinator.served_evaluations import ServedEvaluations
from disttrain_trainer.coordinator.servers import Servers
from disttrain_trainer.coordinator.start_state import StartState
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.coordinator.workers import Workers
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import CheckpointStore, Member, Sender
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

RETURN_SECONDS = 3.0
"""Seconds that a new master of a script's loop waits for workers before it assigns parts. A worker that is not back may have begun some, so
that no other script may get these; it tries to connect at least every second."""
INQUIRY_INTERVAL_SECONDS = 1.0
"""Seconds between two questions to the servers about what they hold."""


class ParameterServerCoordinator:
    """The coordinator of strategy ParameterServer."""

    def __init__(
        self, *, sender: Sender, store: CheckpointStore | None, tracker: Tracker, config: JobConfig, incarnation: str
    ) -> None:
        """incarnation: the master's, another one in each of its processes."""
        self._sender = sender
        self._store = store
        self._tracker = tracker
        self._config = config
        self._servers = Servers(sender=sender, count=config.parameter_servers)
        self._workers = workers = Workers(
            sender=sender,
            tracker=tracker,
            incarnation=incarnation,
            hedges=Hedges.of(config),
            processes=config.strategy.model_parallel_size,
        )
        self._norms = GradientNorms(shards=config.parameter_servers, serves=self._servers.is_primary)
        self._sync = config.strategy.synchronous
        self._fewest = config.min_processes
        self._checkpoints = (
            CheckpointCoordinator(
                sender=sender,
                servers=self._servers,
                store=store,
                tracker=tracker,
                incarnation=incarnation,
                timeout_seconds=config.startup_timeout_seconds,
                parts_per_step=config.parts_per_step,
                every=config.checkpoint.every_steps,
                aligned=self._sync,
                needs_worker=lambda: self._workers.buffers,
                buffer_writer=self._buffer_writer,
                copied=self._copied,
                done=self._saved,
            )
            if store is not None and config.checkpoint is not None
            else None
        )
        self._rounds = Rounds(
            sender=sender,
            servers=self._servers,
            store=store,
            newest=self._newest,
            answered=self._found,
            config=config,
            opened=self._round_opened,
            returned=self._server_returned,
            lost=self._round_lost,
        )
        self._evaluations = ServedEvaluations(
            sender=sender, workers=workers, tracker=tracker, config=config, changed=self._course_changed
        )
        self._completion = Completion(
            sender=sender,
            servers=self._servers,
            workers=workers,
            tracker=tracker,
            checkpoints=self._checkpoints,
            evaluates=config.trainer.evaluate is not None,
            evaluates_earlier_step=self._evaluations.is_pending,
            finish=self._finish,
        )
        self.queue: WorkQueue | None = None
        self._returns = self._known_returns = 0
        """How often parts returned to the queue that may be applied, though no worker has reported them, and how many of these times the
        servers have said since which are. No part is handed out before: a script would get a batch again whose step has returned."""
        self._awaits_workers = isinstance(config.trainer.work, ScriptLoop)
        self._everyone_back_at: float | None = None
        """When a new master assigns parts at the latest; None before it has a round."""
        self._missing_members = MissingMembers()
        self._start = StartState(self._newest, config)
        self._draining = ServedDraining(
            sender, checkpoints=self._checkpoints, queue=lambda: self.queue, tracker=tracker
        )
        self.ended = False

    @property
    def released(self) -> bool:
        return self._draining.released

    def begin(self, now: float) -> None:
        """The master's start."""
        self._rounds.look(now)

    def _newest(self) -> Manifest | None:
        """The newest complete checkpoint."""
        return self._checkpoints.newest if self._checkpoints is not None else None

    def _found(self, manifest: Manifest | None, now: float) -> None:
        """The store's answer to `find`."""
        if self.ended:
            return
        if manifest is not None and self._checkpoints is not None:
            self._checkpoints.know(manifest)
            if manifest.finished:
                self._tracker.adopt(manifest)
                self._finish(now)
                return
        self._rounds.found(now)

    def joined(self, member: Member, hello: Message, now: float) -> None:
        self._missing_members.end(member)
        if self.ended:
            self._sender.send(member, MessageType.FINISH)
        elif member.role is Role.PARAMETER_SERVER:
            self._servers.know(member.rank, hello)
            self._rounds.server_joined(member.rank, now)
            self._take_norms(member.rank, hello)
        elif member.role is Role.WORKER:
            self._workers.join(member.rank)
            if hello.get("samples") is not None:
                self._worker_ready(member.rank, hello, now)

    def on_message(self, member: Member, message: Message, now: float) -> None:
        match member.role, message["type"]:
            case Role.WORKER, MessageType.LEAVING if self._can_spare(member.rank):
                self._workers.retire(member.rank, self.queue)
                self._advance(now)  # another worker evaluates, or its buffers are saved
            case _, MessageType.LEAVING:
                self._draining.add(member)
                self._save_soon(now)
            case Role.PARAMETER_SERVER, MessageType.STATE:
                self._server_state(member.rank, message, now)
            case Role.PARAMETER_SERVER, MessageType.NORM:
                self._take_norms(member.rank, message)
            case Role.PARAMETER_SERVER, MessageType.COPY:
                self._rounds.copy_changed(message, now)
            case _, MessageType.COPIED | MessageType.SAVED if self._checkpoints is not None:
                self._checkpoints.on_message(member, message, now)
            case Role.WORKER, MessageType.READY if message.get("samples") is not None:
                self._worker_ready(member.rank, message, now)
            case Role.WORKER, MessageType.REQUEST:
                self._worker_requests(member.rank, message, now)
            case Role.WORKER, MessageType.REPORT:
                self.reported(member.rank, message, now)
            case Role.WORKER, MessageType.NAN if self._evaluations.has_nan_policy and not self._workers.holds_lease(
                self._worker_of(member.rank), message
            ):
                pass  # of a round that is over: the next one does the part again
            case Role.PARAMETER_SERVER, MessageType.NAN if "id" in message and not (
                self._checkpoints is not None and self._checkpoints.is_writing(message["id"])
            ):
                pass  # of a save that was given up: another server or a worker found the same
            case _, MessageType.NAN if "parts" in message and self._evaluations.may_roll_back:
                self._evaluations.roll_back(message, str(member))
                self._rounds.roll_back(now)
            case _, MessageType.NAN:
                self._tracker.nan_loss = f"{member} at step {message['step']}"
                if "reason" in message:
                    self._sender.send(member, MessageType.NAN, reason=message["reason"])
            case Role.WORKER, MessageType.EVALUATED if self._evaluations.evaluated(member.rank, message, self.queue):
                self._advance(now)
            case Role.WORKER, MessageType.EVALUATED if self._completion.evaluated(member.rank, message):
                self._advance(now)
        self._inquire(now)

    def _worker_of(self, rank: int) -> int:
        """The number of the worker that a process is, or is a part of."""
        return rank

    def reported(self, rank: int, message: Message, now: float) -> None:
        """What a worker computed. The work queue decides which steps are done."""
        self._tracker.take(rank, message, now)

    def lost(self, member: Member, now: float) -> None:
        self._draining.forget(member)
        if self.ended:
            return
        if member.role is not Role.WORKER or member.rank not in self._workers.retiring:
            self._missing_members.begin(member, now)
        if member.role is Role.PARAMETER_SERVER:
            self._servers.lose(member.rank)
            served = member.rank in self._servers.primaries
            if served:
                self._drop_questions()  # if it comes back as it was, it is asked again
            self._rounds.server_lost(member.rank, now)
            if served and not self._rounds.taking_over:
                self._draining.release()  # nothing can be saved without it
        elif member.role is Role.WORKER:
            self._worker_lost(member.rank, now)

    def tick(self, now: float) -> None:
        if not self.ended:
            self._rounds.tick(now)
        self._inquire(now)  # no process sends a message in the middle of a long step
        if self._checkpoints is not None and not self.ended:
            self._checkpoints.tick(now)
        self._advance(
            now
        )  # the last checkpoint may be tried again, and workers that are not back are waited for no longer

    def terminate(self, now: float) -> None:
        self._draining.terminate()
        self._save_soon(now)

    def waiting_for(self, now: float) -> str | None:
        if self.ended:
            return None
        servers, ready = self._servers.missing, len(self._workers.ready)
        if not servers and ready >= self._fewest:
            return self._checkpoints.waiting_for(now) if self._checkpoints is not None else None
        if not servers and self._config.elastic:
            return missing_members.too_few(ready, self._fewest)
        workers = (
            []
            if self._config.elastic
            else [Member(Role.WORKER, rank) for rank in range(self._config.data_parallel_size)]
        )
        return self._missing_members.describe([m for m in workers if m.rank not in self._workers.live] + servers, now)

    # Rounds.

    def _server_state(self, index: int, message: Message, now: float) -> None:
        self._servers.know(index, message)
        if message.get("max_staleness_seen") is not None:
            seen = max(self._tracker.max_staleness_seen or 0, int(message["max_staleness_seen"]))
            self._tracker.max_staleness_seen = seen
        self._tracker.staleness = message.get("staleness")
        self._take_norms(index, message)
        if not self.ended and self._rounds.server_state(index, int(message["generation"]), now):
            self._servers.answer(message)
            self._advance(now)

    def _take_norms(self, index: int, message: Message) -> None:
        for version, norm in self._norms.know(index, message):
            fields = {"generation": self._norms.round_number, "version": version, "norm": norm}
            self._servers.send_to_primaries(MessageType.NORM, **fields)
        newest = self._servers.gradient_norm if self._norms.newest is None else self._norms.newest
        # None while only one server has reported its newest measurements: then the norm before them is the newest that is known.
        if newest is not None:
            self._tracker.gradient_norm = newest

    def _round_opened(self, now: float) -> None:
        self._tracker.round_number = self._rounds.number
        self._tracker.promotions = self._rounds.promotions
        if self._everyone_back_at is None:
            waits = self._awaits_workers and self._rounds.is_inherited
            self._everyone_back_at = now + RETURN_SECONDS if waits else now
        self._make_queue()
        if self._draining.pending or self._draining.terminating:
            self._save_soon(now)
        else:
            self._draining.release()  # the member that was to leave may be lost meanwhile
        self._advance(now)

    def _server_returned(self, now: float) -> None:
        self._make_queue()
        # The server that was away missed the DROP of a worker that was lost meanwhile: all workers would wait for that one there.
        gone = [rank for rank in range(self._config.data_parallel_size) if rank not in self._workers.ready]
        if gone:
            self._ask_applied(MessageType.DROP, now, ranks=gone)
        self._advance(now)

    def _round_lost(self, now: float) -> None:
        self.queue = None
        self._completion.reset()
        self._evaluations.reset()
        self._workers.end_leases()
        self._drop_questions()
        if not self._rounds.taking_over:
            self._draining.release()
        self._workers.send_to_all(MessageType.REFORM)

    def _make_queue(self) -> None:
        """Makes the work queue once every server's applied parts and the size of the data set are known, and invites the workers that are
        ready."""
        if not self._rounds.open or self.queue is not None:
            return
        if self._workers.data is None or not self._servers.complete:
            return  # the last server or worker that joins calls this again
        if reason := self._start.misfit(self._workers.data):
            for rank in self._workers.ready:
                self._sender.send(Member(Role.WORKER, rank), MessageType.WRONG, reason=reason)
            return
        schedule = Schedule.of(self._config, self._workers.data.samples)
        self._tracker.data = self._workers.data
        self.queue = WorkQueue(
            total=schedule.total_parts,
            parts_per_step=self._config.parts_per_step,
            aligned=self._sync,
            done=self._servers.applied,
        )
        self._known_returns = self._returns
        self._tracker.plan(schedule)
        self._tracker.fall_back(self.queue.step)
        self._tracker.reach(self.queue.step)
        if self._checkpoints is not None:
            self._checkpoints.begin(self.queue)
        self._evaluations.begin(self._start.course, self.queue, round_number=self._rounds.number)
        log.info("round %d begins at step %d", self._rounds.number, self.queue.step)
        for rank in self._workers.ready:
            self._invite(rank, self.queue)

    # Workers.

    def _worker_ready(self, rank: int, message: Message, now: float) -> None:
        if not self._workers.admit(rank, message):
            return
        self._evaluations.know(rank, message, self.queue, round_number=self._rounds.number)
        if self.queue is None:
            self._make_queue()
        else:
            if self.queue.holds(rank):
                if self._sync and self._workers.is_invited(rank):
                    self._void_leases(rank)
                self._returns += 1
                self._ask_applied(MessageType.STATE, now)
            self._invite(rank, self.queue)
            self._called_away(rank, now, lost=False)
        if (evaluator := self._evaluations.evaluator) is not None and self._checkpoints is not None:
            self._checkpoints.worker_left(evaluator, now, lost=False)  # this one copies its buffers sooner
        self._advance(now)

    def _void_leases(self, rank: int) -> None:
        """Sync: the parts of a lost worker return to the queue, and every other worker starts over. One that evaluates goes on: it has no
        part.

        Another worker may wait at a server for one of these parts, and so would never request it. It pushes until it gets to know this: its
        own parts return with its READY, and the servers are asked then.
        """
        evaluates = self._evaluations.evaluating
        self._workers.end_leases(but=evaluates)
        self._workers.send_to_all(MessageType.REFORM, but=(rank, evaluates))

    def _invite(self, rank: int, queue: WorkQueue) -> None:
        self._workers.invite(
            rank,
            queue=queue,
            round_number=self._rounds.number,
            buffers=self._start.buffers,
            from_scratch=self._start.from_scratch,
            primaries=self._servers.primaries,
            servers=self._servers.serving,
            course=self._evaluations.course,
        )

    def _worker_requests(self, rank: int, message: Message, now: float) -> None:
        if self.queue is not None and self._workers.take(rank, message, self.queue):
            self._advance(now)

    def _can_spare(self, rank: int) -> bool:
        """Whether a worker that received SIGTERM may leave for good, because enough others stay. When the job itself is ended, none does:
        their state is saved first."""
        stay = [other for other in self._workers.ready if other != rank]
        return self._config.elastic and not self._draining.terminating and len(stay) >= self._fewest

    def _worker_lost(self, rank: int, now: float) -> None:
        retired, evaluated = rank in self._workers.retiring, rank == self._evaluations.evaluator
        self._workers.lose(rank)
        self._called_away(rank, now, lost=True)
        in_order = retired and self.queue is not None and self.queue.can_spare(rank)
        held = self.queue is not None and self.queue.holds(rank)
        if self.queue is None or not (self.queue.leave(rank) or evaluated):
            return
        self._tracker.lost_workers += not retired
        if self._sync and not self.queue.finished and not in_order and not evaluated:
            self._void_leases(rank)
        self._returns += held
        self._ask_applied(MessageType.DROP, now, ranks=[rank])
        self._advance(now)

    def _called_away(self, rank: int, now: float, *, lost: bool) -> None:
        """A worker is lost, or starts over: another worker gets the evaluation or the buffers that it owed."""
        self._completion.worker_left(rank)
        self._evaluations.worker_left(rank, self.queue)
        if self._checkpoints is not None:
            self._checkpoints.worker_left(rank, now, lost=lost)

    # Checkpoints and the end.

    def _buffer_writer(self) -> int | None:
        """The worker whose buffers are saved; None when no worker is ready. The evaluator only when there is no other: it answers nothing
        else before it is done."""
        ready = self._workers.ready if self._workers.buffers else []
        busy = (self._completion.evaluator, self._evaluations.evaluator)
        return next((rank for rank in ready if rank not in busy), next(iter(ready), None))

    def _course_changed(self, course: Course) -> None:
        if self._store is not None:
            self._store.amend(course)

    def _advance(self, now: float) -> None:
        """Takes every step that the present state allows: progress, a checkpoint that is due, the assignment of parts, the completion."""
        queue = self.queue
        if queue is None or self.ended:
            return
        self._tracker.reach(queue.step)
        if not self._servers.complete:
            return
        if queue.finished:
            self._completion.advance(queue, now)
            self._evaluate_between(queue)
            return
        deserted = not self._workers.live and not self._servers.questioned
        if self._checkpoints is not None and self._checkpoints.is_due(queue, now, deserted=deserted):
            self._checkpoints.start(queue.step, now)
        self._evaluate_between(queue)
        self._workers.release_retired(queue)
        hurrying = (
            self._checkpoints is not None and self._checkpoints.hurrying
        )  # then the limit is that of the steps in work
        enough = hurrying or len(self._workers.ready) >= self._fewest
        if self._known_returns == self._returns and enough and self._is_everyone_back(now):
            self._workers.serve(queue)

    def _is_everyone_back(self, now: float) -> bool:
        """Whether every worker has said to this master which parts it may have begun, or is taken for lost."""
        back = len(self._workers.live) >= self._config.data_parallel_size
        return back or (self._everyone_back_at is not None and now >= self._everyone_back_at)

    def _evaluate_between(self, queue: WorkQueue) -> None:
        """Asks a worker to evaluate, when that is due: after its buffers are copied, which it does not do while it evaluates."""
        if self._checkpoints is None or not self._checkpoints.is_copying:
            self._evaluations.advance(queue)

    def _save_soon(self, now: float) -> None:
        """A member drains: saves as soon as possible, and then releases the members that drain. Once others serve the shards of a lost
        server, if they are about to."""
        if self.ended:
            self._draining.release()
        elif not self._rounds.taking_over and self._draining.save_soon(
            now
        ):  # then the round is about to be open again, or lost
            self._advance(now)

    def _copied(self, now: float) -> None:
        """A checkpoint is copied: the training goes on while the copies are written."""
        if self._checkpoints is not None and self.queue is not None:
            self._checkpoints.raise_limit(self.queue)
        self._advance(now)

    def _saved(self, finished: bool, now: float) -> None:
        """A checkpoint is complete, or was abandoned. finished: it was the last one, and is complete."""
        if finished:
            self._draining.release()
            self._finish(now)
            return
        self._draining.saved()
        self._advance(now)

    def _finish(self, now: float) -> None:
        self.ended = True
        self._tracker.finish(now)
        self._workers.send_to_all(MessageType.FINISH)
        self._servers.send_to_all(MessageType.FINISH)

    # Questions to the servers.

    def _inquire(self, now: float) -> None:
        if not self._rounds.open or self.ended or self._completion.confirmed or not self._servers.complete:
            return
        if now - self._servers.asked_at > INQUIRY_INTERVAL_SECONDS:
            self._ask_applied(MessageType.STATE, now)

    def _ask_applied(self, kind: MessageType, now: float, **fields: object) -> None:
        """Has every server say which parts it applied."""
        returns = self._returns

        def learn(applied: IndexSet) -> None:
            if self.queue is not None:
                self.queue.learn(applied)
                self._known_returns = max(self._known_returns, returns)
                self._advance(now)

        self._servers.ask(kind, learn, now, **fields)

    def _drop_questions(self) -> None:
        self._completion.drop_questions()
        self._servers.drop_questions()
        if self._checkpoints is not None:
            self._checkpoints.abandon()
