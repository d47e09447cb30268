"""Training with parameter servers, as the master decides it: who is told what when somebody comes, speaks or is lost.

The servers hold the truth (which slices are applied), the workers come and go. Pure: time is given, sending is the sender's, files
are the archive's.
"""

from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain.api.spec import Consistency
from disttrain_trainer.checkpoint import resuming
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.store import BUFFERS, another_training, name_of
from disttrain_trainer.coordinator.attendance import Absences, Leavers
from disttrain_trainer.coordinator.checkpoints import Saver
from disttrain_trainer.coordinator.completion import Ending
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.rounds import Generations
from disttrain_trainer.coordinator.servers import Servers
from disttrain_trainer.coordinator.work_queue import Ledger
from disttrain_trainer.coordinator.workers import Workers
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.data.schedule import DataSet, Schedule
from disttrain_trainer.net.messages import Message, Say
from disttrain_trainer.net.peers import Archive, Member, Sender
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

INQUIRY_INTERVAL = 1.0
"""Seconds between two questions to the servers about what they hold."""


class ServedTraining:
    """The coordinator of strategy ParameterServer."""

    def __init__(
        self, *, sender: Sender, archive: Archive | None, tracker: Tracker, config: JobConfig, incarnation: str
    ) -> None:
        """incarnation: the master's, another one in each of its processes."""
        strategy = config.strategy.parameter_server
        assert strategy is not None
        self._sender = sender
        self._tracker = tracker
        self._config = config
        self._servers = Servers(sender=sender, count=config.parameter_servers)
        self._workers = workers = Workers(sender=sender, tracker=tracker, incarnation=incarnation)
        self._sync = strategy.consistency is Consistency.SYNC
        self._saver = (
            Saver(
                sender=sender,
                servers=self._servers,
                archive=archive,
                tracker=tracker,
                incarnation=incarnation,
                patience=config.startup_timeout_seconds,
                world_size=config.world_size,
                every=config.checkpoint.every_steps,
                aligned=self._sync,
                keeper=self._keeper,
                done=self._saved,
            )
            if archive is not None and config.checkpoint is not None
            else None
        )
        self._generations = Generations(
            sender=sender,
            servers=self._servers,
            archive=archive,
            newest=lambda: self._saver.newest if self._saver else None,
            workers=config.world_size,
            opened=self._generation_opened,
            returned=self._server_returned,
            lost=self._generation_lost,
        )
        self._ending = Ending(
            sender=sender,
            servers=self._servers,
            workers=workers,
            tracker=tracker,
            saver=self._saver,
            evaluates=config.trainer.evaluate is not None,
            finish=self._finish,
        )
        self._ledger: Ledger | None = None
        self._absences = Absences()
        self._leavers = Leavers(sender)
        self.ended = False

    @property
    def released(self) -> bool:
        return self._leavers.released

    def begin(self, now: float) -> None:
        """The master's start."""
        self._generations.look(now)

    def found(self, manifest: Manifest | None, now: float) -> None:
        """The archive's answer to `find`."""
        if self.ended:
            return
        if manifest is not None and self._saver is not None:
            self._saver.know(manifest)
            if manifest.finished:
                self._tracker.evaluation = manifest.evaluation
                self._tracker.reach(manifest.step)
                self._finish(now)
                return
        self._generations.found(now)

    def joined(self, member: Member, hello: Message, now: float) -> None:
        self._absences.end(member)
        if self.ended:
            self._sender.send(member, Say.FINISH)
        elif member.role is Role.PARAMETER_SERVER:
            self._servers.know(member.rank, hello)
            self._generations.server_joined(now)
        elif member.role is Role.WORKER:
            self._workers.join(member.rank)
            if hello.get("samples") is not None:
                self._worker_ready(member.rank, hello, now)

    def heard(self, member: Member, message: Message, now: float) -> None:
        match member.role, message["type"]:
            case _, Say.LEAVING:
                self._leavers.add(member)
                self._save_soon(now)
            case Role.PARAMETER_SERVER, Say.STATE:
                self._server_state(member.rank, message, now)
            case Role.PARAMETER_SERVER, Say.SAVED if self._saver is not None:
                self._saver.server_saved(member.rank, message, now)
            case Role.WORKER, Say.SAVED if self._saver is not None:
                self._saver.worker_saved(member.rank, message, now)
            case Role.WORKER, Say.READY if message.get("samples") is not None:
                self._worker_ready(member.rank, message, now)
            case Role.WORKER, Say.TAKE:
                self._worker_takes(member.rank, message, now)
            case Role.WORKER, Say.REPORT:
                self.reported(member.rank, message, now)
            case _, Say.NAN:
                self._tracker.nan_loss = f"{member} at step {message['step']}"
            case Role.WORKER, Say.EVALUATED if self._ending.evaluated(member.rank, message):
                self._advance(now)
        self._inquire(now)

    def reported(self, rank: int, message: Message, now: float) -> None:
        """What a worker computed. Which steps are done is the ledger's to say."""
        self._tracker.report(
            rank=rank,
            samples=int(message.get("samples") or 0),
            loss=message.get("loss"),
            now=now,
            weight=message.get("weight"),
            final=message.get("final", ()),
        )
        self._tracker.total_steps = message.get("total_steps") or self._tracker.total_steps

    def lost(self, member: Member, now: float) -> None:
        self._leavers.forget(member)
        if self.ended:
            return
        self._absences.begin(member, now)
        if member.role is Role.PARAMETER_SERVER:
            self._servers.lose(member.rank)
            self._drop_questions()  # if it comes back as it was, it is asked again
        elif member.role is Role.WORKER:
            self._worker_lost(member.rank, now)

    def tick(self, now: float) -> None:
        self._inquire(now)  # in the middle of a long step nobody says anything
        if self._saver is not None and not self.ended:
            self._saver.tick(now)
            self._advance(now)  # the last checkpoint may be tried again

    def terminate(self, now: float) -> None:
        self._leavers.terminate()
        self._save_soon(now)

    def waiting_for(self, now: float) -> str | None:
        if self.ended:
            return None
        servers = self._servers.missing
        if not servers and self._workers.ready:
            return self._saver.waiting_for(now) if self._saver is not None else None
        workers = [Member(Role.WORKER, rank) for rank in range(self._config.world_size)]
        return self._absences.words([m for m in workers if m.rank not in self._workers.live] + servers, now)

    # Generations.

    def _server_state(self, index: int, message: Message, now: float) -> None:
        self._servers.know(index, message)
        if message.get("max_staleness_seen") is not None:
            seen = max(self._tracker.max_staleness_seen or 0, int(message["max_staleness_seen"]))
            self._tracker.max_staleness_seen = seen
        self._tracker.gradient_norm = self._servers.gradient_norm
        if not self.ended and self._generations.server_told(int(message["generation"]), now):
            self._servers.answer(message)
            self._advance(now)

    def _generation_opened(self, now: float) -> None:
        self._tracker.generation = self._generations.number
        self._make_ledger()
        self._advance(now)

    def _server_returned(self, now: float) -> None:
        self._make_ledger()
        # Who was lost while a server could not be told would be waited for on it, by all the others.
        gone = [rank for rank in range(self._config.world_size) if rank not in self._workers.ready]
        if gone:
            self._servers.ask(Say.DROP, self._learn, now, ranks=gone)
        self._advance(now)

    def _generation_lost(self, now: float) -> None:
        self._ledger = None
        self._ending.reset()
        self._workers.end_stays()
        self._drop_questions()
        self._workers.tell(Say.REFORM)

    def _make_ledger(self) -> None:
        """As soon as every server's slices and the size of the dataset are known; then the workers that are ready may come."""
        if not self._generations.open or self._ledger is not None:
            return
        if self._workers.data is None or not self._servers.complete:
            return  # asked again when the last one comes
        world_size = self._config.world_size
        if self._is_of_another_data_set(self._workers.data):
            return
        schedule = Schedule.of(self._config, self._workers.data.samples)
        self._tracker.data = self._workers.data
        self._ledger = Ledger(
            total=schedule.total_slices, world_size=world_size, aligned=self._sync, done=self._servers.applied
        )
        self._tracker.total_steps, self._tracker.steps_per_epoch = schedule.total_steps, schedule.steps_per_epoch
        self._tracker.fall_back(self._ledger.step)
        self._tracker.reach(self._ledger.step)
        if self._saver is not None:
            self._saver.begin(self._ledger)
        log.info("generation %d begins at step %d", self._generations.number, self._ledger.step)
        for rank in self._workers.ready:
            self._invite(rank)

    def _is_of_another_data_set(self, data: DataSet) -> bool:
        """Whether the servers began from a checkpoint of another one; then it refuses the workers with the reason."""
        newest = self._saver.newest if self._saver else None
        problem = resuming.misfit(newest.data, resuming.data_of(self._config, data)) if newest else None
        if newest is None or problem is None:
            return False
        reason = another_training(name_of(newest.step), problem)
        for rank in self._workers.ready:
            self._sender.send(Member(Role.WORKER, rank), Say.WRONG, reason=reason)
        return True

    # Workers.

    def _worker_ready(self, rank: int, message: Message, now: float) -> None:
        if not self._workers.admit(rank, message):
            return
        if self._ledger is None:
            self._make_ledger()
        else:
            if self._sync and self._ledger.holds(rank):
                self._void_stays(rank)
                self._servers.ask(Say.STATE, self._learn, now)
            self._invite(rank)
            self._called_away(rank)
        self._advance(now)

    def _void_stays(self, rank: int) -> None:
        """Sync: slices of a worker return. The others may wait for one of them: only who starts anew, from the lowest, computes it.

        What they have returns, too, or each of them would say READY with slices, and send all others away once more.
        """
        assert self._ledger is not None
        self._ledger.recall()
        self._workers.end_stays()
        self._workers.tell(Say.REFORM, but=rank)

    def _invite(self, rank: int) -> None:
        assert self._ledger is not None
        newest = self._saver.newest if self._saver else None
        file = newest.file_of(BUFFERS) if newest else None
        buffers = f"{name_of(newest.step)}/{file}" if newest and file else None
        self._workers.invite(
            rank, ledger=self._ledger, generation=self._generations.number, buffers=buffers, anew=newest is None
        )

    def _worker_takes(self, rank: int, message: Message, now: float) -> None:
        if self._ledger is not None and self._workers.take(rank, message, self._ledger):
            self._advance(now)

    def _worker_lost(self, rank: int, now: float) -> None:
        self._workers.lose(rank)
        self._called_away(rank)
        if self._ledger is None or not self._ledger.leave(rank):
            return
        self._tracker.lost_workers += 1
        if self._sync and not self._ledger.finished:
            self._void_stays(rank)
        self._servers.ask(Say.DROP, self._learn, now, ranks=[rank])
        self._advance(now)

    def _called_away(self, rank: int) -> None:
        """A worker is lost, or begins anew: what it was asked for beside its slices is asked again."""
        self._ending.worker_left(rank)
        if self._saver is not None:
            self._saver.worker_left(rank)

    # Checkpoints and the end.

    def _keeper(self) -> int | None:
        """Whose buffers are saved: another's than the evaluator's, who does not answer before it is done, if there is another."""
        ready = self._workers.ready if self._workers.buffers else []
        return next((rank for rank in ready if rank != self._ending.evaluator), next(iter(ready), None))

    def _advance(self, now: float) -> None:
        """Draws the conclusions of what is known: progress, a checkpoint that is due, the end."""
        ledger = self._ledger
        if ledger is None or self.ended:
            return
        self._tracker.reach(ledger.step)
        if not self._servers.complete:
            return
        if ledger.finished:
            self._ending.advance(ledger, now)
            return
        if self._saver is not None and self._saver.is_due(ledger, now):
            self._saver.start(ledger.step, now)
        self._workers.serve(ledger)

    def _save_soon(self, now: float) -> None:
        """Somebody leaves: save as soon as it can be done, then let them go."""
        saver, ledger = self._saver, self._ledger
        if (
            self.ended
            or saver is None
            or ledger is None
            or self._tracker.nan_loss
            or not (saver.busy or saver.misses(ledger))
        ):
            self._release()
            return
        saver.hurry(ledger, now)
        self._advance(now)

    def prepared(self, save: str, folder: str | OSError, now: float) -> None:
        """The archive's answer to `prepare`."""
        if self._saver is not None:
            self._saver.prepared(save, folder, now)

    def published(self, save: str, manifest: Manifest | OSError, now: float) -> None:
        """The archive's answer to `publish`."""
        if self._saver is not None:
            self._saver.published(save, manifest, now)

    def _saved(self, finished: bool, now: float) -> None:
        """A checkpoint is complete, or was given up. finished: it was the last one, and is complete."""
        if self._saver is not None and self._ledger is not None:
            self._saver.raise_limit(self._ledger)
        self._release()
        if finished:
            self._finish(now)
        else:
            self._advance(now)

    def _finish(self, now: float) -> None:
        self.ended = True
        self._tracker.finish(now)
        self._workers.tell(Say.FINISH)
        self._servers.tell(Say.FINISH)

    def _release(self) -> None:
        self._leavers.release()
        if self._saver is not None:
            self._saver.hurrying = False

    # Questions to the servers.

    def _inquire(self, now: float) -> None:
        if not self._generations.open or self.ended or self._ending.confirmed or not self._servers.complete:
            return
        if now - self._servers.asked_at > INQUIRY_INTERVAL:
            self._servers.ask(Say.STATE, self._learn, now)

    def _learn(self, applied: IndexSet) -> None:
        if self._ledger is not None:
            self._ledger.learn(applied)

    def _drop_questions(self) -> None:
        self._ending.drop_questions()
        self._servers.drop_questions()
        if self._saver is not None:
            self._saver.abandon()
        self._release()
