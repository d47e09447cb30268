"""Training with parameter servers, as the master decides it: generations, the ledger, checkpoints, the end.

The servers hold the truth (which slices are applied), the workers come and go. A generation begins with every server at the same
checkpoint, and ends when one of them is lost. Pure: time is given, sending is the sender's, files are the archive's.
Not here: the workers' stays and tickets (workers.py), what the servers hold (servers.py), checkpoints (saver.py), slices (ledger.py).
"""

import logging
from enum import Enum, auto

from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain.api.spec import Consistency
from disttrain_trainer.checkpoint.folder import BUFFERS, name_of, shard_of
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.data.slices import Schedule, SliceSet
from disttrain_trainer.master.ledger import Ledger
from disttrain_trainer.master.member import Archive, Member, Sender
from disttrain_trainer.master.saver import Saver
from disttrain_trainer.master.servers import Servers, Then
from disttrain_trainer.master.tracker import Tracker
from disttrain_trainer.master.workers import Workers
from disttrain_trainer.messages import Message, Say

log = logging.getLogger(__name__)

INQUIRY_INTERVAL = 1.0
"""Seconds between two questions to the servers about what they hold."""


class _Phase(Enum):
    LOOKING = auto()
    """For the newest checkpoint."""
    GATHERING = auto()
    """A server is missing."""
    BEGINNING = auto()
    """The servers load the checkpoint."""
    TRAINING = auto()
    EVALUATING = auto()
    """All slices are applied; a worker looks at the final parameters."""
    ENDED = auto()


class ServedTraining:
    """The coordinator of strategy ParameterServer."""

    def __init__(
        self, *, sender: Sender, archive: Archive | None, tracker: Tracker, config: JobConfig, incarnation: str
    ) -> None:
        """incarnation: the master's, another one in each of its processes."""
        strategy = config.strategy.parameter_server
        assert strategy is not None
        self._sender = sender
        self._archive = archive
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
                keeper=lambda: next(iter(workers.ready), None) if workers.buffers else None,
                done=self._saved,
            )
            if archive is not None and config.checkpoint is not None
            else None
        )
        self._tracker = tracker
        self._config = config
        self._phase = _Phase.LOOKING
        self._generation = 0
        self._ledger: Ledger | None = None
        self._asked_at = 0.0
        self._confirming = False
        self._evaluator: int | None = None
        self._leavers: set[Member] = set()
        self._terminating = False
        self._absent: dict[Member, float] = {}
        self.released = False

    @property
    def ended(self) -> bool:
        return self._phase is _Phase.ENDED

    def begin(self, now: float) -> None:
        """The master's start."""
        self._look(now)

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
        self._phase = _Phase.GATHERING
        self._gather(now)

    def joined(self, member: Member, hello: Message, now: float) -> None:
        self._absent.pop(member, None)
        if self.ended:
            self._sender.send(member, Say.FINISH)
        elif member.role is Role.PARAMETER_SERVER:
            self._servers.know(member.rank, hello)
            self._server_joined(now)
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
            case Role.WORKER, Say.EVALUATED if member.rank == self._evaluator and message.get("evaluation") is not None:
                self._tracker.evaluation = message["evaluation"]
                self._evaluator = None
                self._conclude(now)
        self._inquire(now)

    def reported(self, rank: int, message: Message, now: float) -> None:
        """What a worker computed. Which steps are done is the ledger's to say."""
        self._tracker.report(rank=rank, samples=int(message.get("samples") or 0), loss=message.get("loss"), now=now)
        self._tracker.total_steps = message.get("total_steps") or self._tracker.total_steps

    def lost(self, member: Member, now: float) -> None:
        self._leavers.discard(member)
        if self.ended:
            return
        self._absent[member] = now
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
        self._terminating = True
        self._save_soon(now)

    def waiting_for(self, now: float) -> str | None:
        missing = self._servers.missing
        if self.ended:
            return None
        if not missing and any(samples is not None for samples in list(self._workers.live.values())):
            return self._saver.waiting_for(now) if self._saver is not None else None
        workers = [Member(Role.WORKER, rank) for rank in range(self._config.world_size)]
        missing = [m for m in workers if m.rank not in self._workers.live] + missing
        if not missing:
            return None
        longest = max(now - self._absent.setdefault(m, now) for m in missing)
        names = ", ".join(map(str, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        return f"{names} ({longest:.0f} s)"

    # Generations.

    def _look(self, now: float) -> None:
        self._phase = _Phase.LOOKING
        if self._archive is not None:
            self._archive.find()
        else:
            log.info("there is no checkpoint volume: if a server is lost, the training begins anew")
            self.found(None, now)

    def _server_joined(self, now: float) -> None:
        if self._phase is _Phase.GATHERING or self._same_generation():
            self._gather(now)
        elif self._phase is not _Phase.LOOKING:
            # A server without the present generation: its shard is lost, and with it the generation.
            self._begin_anew(now)

    def _same_generation(self) -> bool:
        return self._servers.generations <= {self._generation}

    def _gather(self, now: float) -> None:
        """With every server here: go on with the generation that they all have, or begin one."""
        if not self._servers.complete:
            return
        generations = self._servers.generations
        if len(generations) > 1:
            self._begin_anew(now)
        elif 0 in generations:
            self._begin_generation(now)
        elif self._phase is _Phase.GATHERING:
            self._take_over(generations.pop(), now)
        elif self._phase is _Phase.BEGINNING:
            self._open(now)  # the last one said so when it came back
        else:
            self._make_ledger()
            # Who was lost while a server could not be told would be waited for on it, by all the others.
            gone = [rank for rank in range(self._config.world_size) if rank not in self._workers.ready]
            if gone:
                self._ask(Say.DROP, self._learn, now, ranks=gone)
            self._advance(now)

    def _take_over(self, generation: int, now: float) -> None:
        """The master is new, the servers are not. A worker that was lost with the old one is nobody's to drop: all are dropped.

        Each gets a new stay in any case, but only once it is dropped everywhere: later it might be thrown out of the new one.
        """
        self._generation = generation

        def dropped(_: SliceSet) -> None:
            if self._same_generation():
                self._open(now)
            else:
                self._begin_anew(now)

        self._ask(Say.DROP, dropped, now, ranks=list(range(self._config.world_size)))

    def _begin_anew(self, now: float) -> None:
        """The generation is lost: back to the newest checkpoint."""
        log.warning("a server was lost: every shard goes back to the last checkpoint")
        self._ledger = self._evaluator = self._tracker.evaluation = None
        self._workers.end_stays()
        self._drop_questions()
        self._generation = max(self._generation, *self._servers.generations)
        self._servers.forget_generations()
        self._workers.tell(Say.REFORM)
        self._look(now)

    def _begin_generation(self, now: float) -> None:
        self._phase = _Phase.BEGINNING
        self._generation += 1
        newest = self._saver.newest if self._saver else None
        for index in range(self._servers.count):
            name = newest.file_of(shard_of(index)) if newest else None
            file = f"{name_of(newest.step)}/{name}" if newest and name else None
            self._sender.send(Member(Role.PARAMETER_SERVER, index), Say.BEGIN, generation=self._generation, file=file)

    def _server_state(self, index: int, message: Message, now: float) -> None:
        self._servers.know(index, message)
        if message.get("max_staleness_seen") is not None:
            seen = max(self._tracker.max_staleness_seen or 0, int(message["max_staleness_seen"]))
            self._tracker.max_staleness_seen = seen
        begun = self._phase in (_Phase.BEGINNING, _Phase.TRAINING, _Phase.EVALUATING)
        if begun and int(message["generation"]) > self._generation:
            self._begin_anew(now)  # the last order of a master that is gone, carried out only now
            return
        if self._phase is _Phase.BEGINNING:
            if self._servers.complete and self._same_generation():
                self._open(now)
            return
        self._servers.answer(message)
        self._advance(now)

    def _open(self, now: float) -> None:
        """Every server has the generation: the workers may come."""
        self._phase = _Phase.TRAINING
        self._tracker.generation = self._generation
        self._make_ledger()
        self._advance(now)

    def _make_ledger(self) -> None:
        """As soon as every server's slices and the size of the dataset are known; then the workers that are ready may come."""
        if self._phase is not _Phase.TRAINING or self._ledger is not None:
            return
        if self._workers.samples is None or not self._servers.complete:
            return  # asked again when the last one comes
        trainer, world_size = self._config.trainer, self._config.world_size
        schedule = Schedule(
            samples=self._workers.samples,
            batch_size=trainer.batch_size,
            world_size=world_size,
            seed=trainer.seed,
            epochs=trainer.epochs,
            max_steps=trainer.max_steps,
        )
        self._ledger = Ledger(
            total=schedule.total_slices, world_size=world_size, aligned=self._sync, done=self._servers.applied
        )
        self._tracker.total_steps, self._tracker.steps_per_epoch = schedule.total_steps, schedule.steps_per_epoch
        self._tracker.fall_back(self._ledger.step)
        self._tracker.reach(self._ledger.step)
        if self._saver is not None:
            self._saver.begin(self._ledger)
        log.info("generation %d begins at step %d", self._generation, self._ledger.step)
        for rank in self._workers.ready:
            self._invite(rank)

    # Workers.

    def _worker_ready(self, rank: int, message: Message, now: float) -> None:
        if not self._workers.admit(rank, message):
            return
        if self._ledger is None:
            self._make_ledger()
        else:
            if self._sync and self._ledger.holds(rank):
                self._void_stays(rank)
                self._ask(Say.STATE, self._learn, now)
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
            rank, ledger=self._ledger, generation=self._generation, buffers=buffers, anew=newest is None
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
        self._ask(Say.DROP, self._learn, now, ranks=[rank])
        self._advance(now)

    def _called_away(self, rank: int) -> None:
        """A worker is lost, or begins anew: what it was asked for beside its slices is asked again."""
        if self._evaluator == rank:
            self._evaluator = None
        if self._saver is not None:
            self._saver.worker_left(rank)

    # Checkpoints and the end.

    def _advance(self, now: float) -> None:
        """Draws the conclusions of what is known: progress, a checkpoint that is due, the end."""
        ledger = self._ledger
        if ledger is None or self._phase not in (_Phase.TRAINING, _Phase.EVALUATING):
            return
        self._tracker.reach(ledger.step)
        if not self._servers.complete:
            return
        if ledger.finished:
            self._confirm(now)
        elif self._saver is not None and self._saver.is_due(ledger):
            self._saver.start(ledger.step, now)
        if self._phase is _Phase.TRAINING:
            self._workers.serve(ledger)

    def _save_soon(self, now: float) -> None:
        """Somebody leaves: save as soon as it can be done, then let them go."""
        saver, ledger = self._saver, self._ledger
        if saver is None or ledger is None or self._tracker.nan_loss or not (saver.busy or self._unsaved):
            self._release()
            return
        saver.hurry(ledger)
        self._advance(now)

    @property
    def _unsaved(self) -> bool:
        """Whether there are steps that a checkpoint could keep now."""
        saver, ledger = self._saver, self._ledger
        if saver is None or ledger is None or not self._servers.complete:
            return False
        return self._phase in (_Phase.TRAINING, _Phase.EVALUATING) and ledger.step != (
            saver.newest.step if saver.newest else 0
        )

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

    def _confirm(self, now: float) -> None:
        """Every slice was said to be applied: ask the servers, who know."""
        if self._phase is _Phase.EVALUATING:
            self._conclude(now)
        elif not self._confirming:
            self._confirming = True

            def then(applied: SliceSet) -> None:
                self._confirming = False
                assert self._ledger is not None
                gone = self._ledger.unlearn(applied)
                if gone:
                    log.warning(
                        "%d slices were counted, but are not applied on every server; they are done again", len(gone)
                    )
                else:
                    self._phase = _Phase.EVALUATING

            self._ask(Say.STATE, then, now)

    def _conclude(self, now: float) -> None:
        """All is applied: evaluate, save, finish. The servers themselves save nothing that is not finite."""
        saver, ledger = self._saver, self._ledger
        if saver is not None and saver.busy:
            return
        if self._config.trainer.evaluate is not None and self._tracker.evaluation is None:
            ready = self._workers.ready
            if saver is not None and ledger is not None and saver.hurrying and self._unsaved:
                saver.start(ledger.step, now)  # somebody leaves, and the evaluation may take longer than they can wait
            elif self._evaluator is None and ready:
                self._evaluator = ready[0]
                self._sender.send(Member(Role.WORKER, ready[0]), Say.EVALUATE)
        elif saver is not None and ledger is not None:
            saver.start(ledger.step, now, final=True)
        else:
            self._finish(now)

    def _finish(self, now: float) -> None:
        self._phase = _Phase.ENDED
        self._tracker.finish(now)
        self._workers.tell(Say.FINISH)
        self._servers.tell(Say.FINISH)

    def _release(self) -> None:
        for member in self._leavers:
            self._sender.send(member, Say.RELEASED)
        self._leavers.clear()
        if self._saver is not None:
            self._saver.hurrying = False
        self.released = self._terminating

    # Questions to the servers.

    def _ask(self, kind: Say, then: Then, now: float, **fields: object) -> None:
        self._asked_at = now
        self._servers.ask(kind, then, **fields)

    def _inquire(self, now: float) -> None:
        if now - self._asked_at > INQUIRY_INTERVAL and self._phase is _Phase.TRAINING and self._servers.complete:
            self._ask(Say.STATE, self._learn, now)

    def _learn(self, applied: SliceSet) -> None:
        if self._ledger is not None:
            self._ledger.learn(applied)

    def _drop_questions(self) -> None:
        self._confirming = False
        self._servers.drop_questions()
        if self._saver is not None:
            self._saver.abandon()
        self._release()
