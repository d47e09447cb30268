"""A shard, its consistency policy and its workers under one lock: what the connections of one round share.

Any thread may call any method. A waiting worker blocks on a condition variable, which is notified when a worker may start; nothing polls.
A host whose round is over refuses every call; a thread that still works on its shard has no effect on the next one.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence

from disttrain.api.schedule import LearningRateSchedule
from disttrain.api.strategy import Consistency as ConsistencyName
from disttrain.api.strategy import ParameterServerStrategy
from disttrain_trainer.checkpoint.background import HostCopy
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model import clipping
from disttrain_trainer.model.flat import Layout, Span
from disttrain_trainer.model.parameter_groups import Groups
from disttrain_trainer.net.frames import Reason, Refusal
from disttrain_trainer.parameter_server import consistency
from disttrain_trainer.parameter_server.assembly import Assemblies, Pushed
from disttrain_trainer.parameter_server.gradient_norm import NormSamples
from disttrain_trainer.parameter_server.optimizer import Optimizer
from disttrain_trainer.parameter_server.participation import Took, union
from disttrain_trainer.parameter_server.sessions import Gradient, Session, Waiting
from disttrain_trainer.parameter_server.shard import Buffers, Shard
from disttrain_trainer.parameter_server.shard_file import ShardFile
from disttrain_trainer.parameter_server.shard_state import ShardState
from disttrain_trainer.parameter_server.step_rate import StepRate
from disttrain_trainer.parameter_server.update_log import Record, UpdateLog

LOOK_SECONDS = 0.05
"""Between two looks at whether a checkpoint that waits for a step is wanted still."""


class ShardHost:
    """One shard in a round, from the initial parameters, from a checkpoint or from its primary.

    Any thread may call its methods: they take one lock.

    A request that it does not accept raises Refusal, as every one after `end` does.
    """

    def __init__(
        self,
        *,
        number: int,
        shard: int,
        shards: int,
        parts_per_step: int,
        strategy: ParameterServerStrategy,
        optimizer: Optimizer,
        checkpoint: ShardFile | None = None,
        term: int = 1,
        is_primary: bool = True,
        schedule: LearningRateSchedule | None = None,
        groups: Groups = (),
        observe_staleness: Callable[[int], None] | None = None,
        clip: float | None = None,
    ) -> None:
        """term: see docs/design/0011. checkpoint: of a copy, the snapshot of its primary. schedule: of the learning rate; None: constant.
        groups: of the parameters, of a copy; a primary knows them from its first worker. clip: the largest norm of a gradient; None:
        any.

        observe_staleness is called with the lock held.
        """
        self.number = number
        self.term = term
        self.is_primary = is_primary
        """Whether it serves workers; else it follows another server's."""
        self.complete = is_primary
        """Whether a copy has all that workers have heard of, and follows on."""
        self._parts_per_step = parts_per_step
        self._place = (shard, shards)
        self._sync = strategy.consistency is ConsistencyName.SYNC
        self._rate = StepRate(schedule, stale=strategy.stale_learning_rate, parts_per_step=parts_per_step)
        self._optimizer = optimizer
        self.groups: Groups = ()
        """Of the parameters, once `knows_groups`."""
        self.knows_groups = optimizer.groups == 1
        self._observe_staleness = observe_staleness
        self._changed = threading.Condition()
        self.over = False
        """Whether `end` was called."""
        self._shard: Shard | None = None
        self._weights: dict[int, float] = {}
        """Of the gradients of the update that is being made, by part; how they come must not matter to their sum."""
        self._owned = False
        """Whether one of them is the loss's own: then they are not 1 together."""
        self._took: list[Took] = []
        self._sessions: dict[int, Session] = {}
        self._waited = 0.0
        self._norms = NormSamples()
        self._measures = self._sync and clip is None and strategy.local_steps == 1
        """Whether what the steps are made of is a gradient, whose norm is not known otherwise."""
        self._clip = clip
        self._policy = consistency.build(
            strategy,
            parts_per_step=parts_per_step,
            version=checkpoint.version if checkpoint else 0,
            accepted=checkpoint.applied.copy() if checkpoint else None,
            clips=clip is not None,
        )
        self._first = self._policy.version
        self._kept: dict[int, bytes | bytearray] = {}
        """Sync: the buffers of a step, which are opaque here, of the versions that a worker may still read, and of the last one saved."""
        self._saved = self._first
        self.assemblies = Assemblies(self)
        """What ranks of groups bring in shares."""
        self._log: UpdateLog | None = None
        """What goes to the copy of this shard, if there is one."""
        if checkpoint is not None:
            if self._policy.accepted != checkpoint.applied:
                raise WrongInput(
                    f"the saved shard of version {checkpoint.version} has {len(checkpoint.applied)} parts applied, which no "
                    f"synchronous training with {parts_per_step} parts a step has"
                )
            self._shard = self._build(checkpoint.layout)
            if not is_primary:
                self._know_groups(self._shard, groups)
            self._shard.restore(checkpoint)

    def enter(
        self, session: Session, layout: Layout, *, total_steps: int | None = None, groups: Groups = ()
    ) -> tuple[int, bool]:
        """A worker connects; returns the version and whether the parameters have values. It replaces an earlier session of its rank.

        total_steps: of the job, which a learning rate that changes needs. groups: of the parameters."""
        with self._changed:
            self._require_going_on()
            if self._shard is None:
                self._shard = self._build(layout)
            elif self._shard.layout != layout:
                raise Refusal(
                    Reason.LAYOUT,
                    f"trainer.model: worker {session.rank} has another model than this shard is of: names, shapes or dtypes of the "
                    f"parameters differ ({layout} there, {self._shard.layout} here); a checkpoint fits only the model that it is of",
                )
            try:
                self._rate.know(total_steps)
                self._know_groups(self._shard, groups)
            except WrongInput as error:
                raise Refusal(Reason.LAYOUT, str(error)) from None
            former = self._sessions.get(session.rank)
            if former is not None:
                self._policy.leave(session.rank)
                self._changed.notify_all()
            self._sessions[session.rank] = session
            found = self._policy.version, self._shard.initialized
        if former is not None and former.share is not None:
            self.assemblies.abandon(former.share.lease)
        return found

    def exit(self, session: Session) -> bool:
        """A worker's connection ended; no worker waits for it any more. False when another session had replaced it."""
        with self._changed:
            if self._sessions.get(session.rank) is not session:
                return False
            del self._sessions[session.rank]
            self._policy.leave(session.rank)
            self._changed.notify_all()
        if session.share is not None:
            self.assemblies.abandon(session.share.lease)
        return True

    def take(self) -> Buffers:
        """Buffers to receive values or a gradient into; hand them to `initialize` or `push`, or `give` them back."""
        with self._changed:
            return self._known_shard().take()

    def give(self, buffers: Buffers) -> None:
        """Takes back buffers of `take` that are not needed."""
        with self._changed:
            self._known_shard().give(buffers)

    def initialize(self, values: Buffers) -> bool:
        """The first values win: False when there were some already."""
        with self._changed:
            self._require_going_on()
            shard = self._known_shard()
            if shard.initialized:
                shard.give(values)
                return False
            shard.initialize(values)
            self._changed.notify_all()
            return True

    def join(self, session: Session, at: int) -> int:
        """The worker takes part from now on, with clock `at` or later; returns its clock."""
        with self._changed:
            self._require_current(session)
            return self._policy.join(session.rank, at)

    def leave(self, session: Session) -> None:
        """The worker takes no part until it joins again."""
        with self._changed:
            self._require_current(session)
            self._policy.leave(session.rank)
            self._changed.notify_all()

    def brought(self, session: Session, clock: int) -> int:
        """The worker has brought its share of the gradient of its iteration `clock`; returns the shard's version."""
        with self._changed:
            self._require_current(session)
            before = self._policy.gate
            self._policy.complete(session.rank, clock)
            if self._policy.gate != before:
                self._changed.notify_all()
            return self._policy.version

    @property
    def spans(self) -> Sequence[Span]:
        """What of each vector is this shard's."""
        with self._changed:
            return self._known_shard().spans

    def push(self, session: Session, gradient: Gradient, buffers: Buffers | None) -> Pushed:
        """Applies a gradient if its part is new. buffers: its values; None: a part without samples.

        Raises Refusal before there are parameters, and for a part of another step than Sync allows.
        """
        with self._changed:
            self._require_going_on()
            shard, before = self._known_shard(), self._policy.gate
            if not shard.initialized:
                raise Refusal(
                    Reason.MISTAKE, f"part {gradient.index} has a gradient, but this shard has no parameters yet"
                )
            if self._clip is not None and not self._sync and buffers is not None and gradient.norm is None:
                raise Refusal(Reason.MISTAKE, f"part {gradient.index} comes without the norm of its gradient")
            try:
                arrival = self._policy.arrive(gradient.index, empty=buffers is None)
            except consistency.OutOfStep as error:
                raise Refusal(Reason.MISTAKE, str(error)) from None
            if arrival is None:
                if buffers is not None:
                    shard.give(buffers)
            else:
                try:
                    if buffers is not None:
                        shard.hold(gradient.index, buffers, self._weigh(gradient))
                    staleness = max(0, shard.version - gradient.version)
                    if self._observe_staleness is not None and buffers is not None:
                        self._observe_staleness(staleness)
                    rate = self._rate.factor(gradient.index, staleness)
                    self._absorb(shard, arrival.additions, index=gradient.index, update=arrival.update, rate=rate)
                    if arrival.summed is not None:
                        self._sum_is_whole(shard, arrival.summed)
                except BaseException:
                    self.over = True  # the part counts already, and may be half applied: this shard must not be read or saved any more
                    raise
            if self._sessions.get(session.rank) is session:
                # Also for a part that another worker had done: this worker's iteration is complete in either case.
                self._policy.complete(session.rank, gradient.clock)
            if self._policy.gate != before:
                self._forget_buffers()
                self._changed.notify_all()
            return Pushed(self._policy.version, late=arrival is None)

    def _absorb(
        self,
        shard: Shard,
        additions: Sequence[tuple[int, int]],
        *,
        index: int,
        update: int | None,
        rate: float = 1.0,
        factor: float = 1.0,
        divisor: float | None = None,
        norm: float | None = None,
    ) -> None:
        """As Shard.absorb, and what becomes an update goes to the copy, too. index: of one of its parts. norm: that of the gradient."""
        measure = self._measures and self._norms.due(shard.version + 1)
        updates = update is not None
        copy = shard.take_sum() if updates and self._log is not None else None
        took = self._all_took(shard) if updates else None
        if updates and divisor is None:
            divisor = self._divisor()
        squared = shard.absorb(
            additions,
            update=update,
            divisor=1.0 if divisor is None else divisor,
            factor=factor,
            took=took,
            rate=rate,
            measure=measure,
            copy=copy,
        )
        if self._log is not None and (updates or not self._sync):
            record = Record(
                parts=self._parts_of(index), gradient=copy, scale=shard.last_scale, rate=rate, norm=norm, took=took
            )
            self._log.add(record)
        if squared is not None:
            self._norms.add(shard.version, squared)

    def _sum_is_whole(self, shard: Shard, first: int) -> None:
        """Sync with a clip: the shard holds the sum of a step under this part, and waits for the norm of the whole gradient."""
        raise NotImplementedError

    def pull(
        self,
        session: Session,
        *,
        clock: int,
        step: int | None,
        waiting: Waiting,
        patience_seconds: float | None = None,
    ) -> Buffers | None:
        """Blocks until the worker may start iteration `clock`, and returns the parameters to read; call `release` with them afterwards.
        None where it may not within the patience."""
        may_start = self._wait(
            lambda: self._may_start(session, clock, step), lambda: self._reason(step), waiting, patience_seconds
        )
        if not may_start:
            return None
        self.settle(waiting)
        with self._changed:
            self._require_going_on()
            return self._known_shard().acquire(step)

    def settle(self, waiting: Waiting) -> None:
        """Blocks until the copy of this shard, if there is one, has all that was changed before this call."""
        with self._changed:
            log = self._log
            if log is None:
                return
            made = log.made
        self._wait(lambda: log.has(made), lambda: f"the copy of shard {self._place[0]} on another server", waiting)

    def _wait(
        self,
        ready: Callable[[], bool],
        reason: Callable[[], str],
        waiting: Waiting,
        patience_seconds: float | None = None,
    ) -> bool:
        """Blocks until it is ready, and the round goes on; refuses after the time-out. Both are called with the lock.

        False when it is not ready within the patience.
        """
        begin = time.monotonic()
        left = math.inf if patience_seconds is None else patience_seconds
        try:
            while True:
                with self._changed:
                    if self._changed.wait_for(lambda: self.over or ready(), min(waiting.heartbeat_seconds, left)):
                        self._require_going_on()
                        return True
                    why = reason()
                if patience_seconds is not None:
                    left = begin + patience_seconds - time.monotonic()
                    if left <= 0:
                        return False
                if time.monotonic() - begin >= waiting.timeout_seconds:
                    raise Refusal(Reason.TIMEOUT, f"waited {waiting.timeout_seconds:g} s for {why}")
                waiting.still_waiting(why)
        finally:
            with self._changed:
                self._waited += time.monotonic() - begin

    def release(self, buffers: Buffers) -> None:
        """The end of a read."""
        with self._changed:
            self._known_shard().release(buffers)

    def keep(self, session: Session, step: int, buffers: bytes | bytearray) -> None:
        """Sync: part 0 of this step left these buffers, from which the parts of the next step start. Call it before the part is pushed."""
        with self._changed:
            self._require_current(session)
            if step == self._policy.version:  # else another worker computed the part before
                self._kept[step + 1] = buffers
                if self._log is not None:
                    self._log.add(Record(kept=(step + 1, buffers)))

    def kept(self, session: Session, step: int) -> bytes | bytearray | None:
        """Sync: the buffers of a step; empty for those with which the round began. None when a later step has taken their place."""
        with self._changed:
            self._require_current(session)
            if step > self._policy.version:
                raise Refusal(
                    Reason.MISTAKE, f"step {step} has no buffers yet; this shard is at {self._policy.version}"
                )
            return b"" if step == self._first else self._kept.get(step)

    def end(self) -> None:
        """Ends the round: every waiting and every later call is refused."""
        with self._changed:
            self.over = True
            if self._log is not None:
                self._log.end()
            self._changed.notify_all()

    def snapshot(
        self, memory: HostCopy, step: int | None = None, wanted: Callable[[], bool] = lambda: True
    ) -> ShardFile:
        """A copy of the current version in this memory. Refuses when there are no parameters yet, or the round is over.

        step: of the checkpoint, in a synchronous training. Blocks while the last step before it waits for its norm: the master counts a
        step whose parts have all arrived. Refuses once the copy is not wanted any more: the norm may need what the master does after it."""
        with self._changed:
            while not self._changed.wait_for(lambda: self.over or not self._is_before(step), LOOK_SECONDS):
                if not wanted():
                    raise Refusal(
                        Reason.ROUND, f"step {step} is not complete, and its checkpoint is not wanted any more"
                    )
            self._require_going_on()
            shard = self._known_shard()
            if not shard.initialized:
                raise Refusal(Reason.MISTAKE, "this shard has no parameters yet")
            self._saved = self._policy.version
            return shard.snapshot(self._policy.in_version, memory)

    def state(self) -> ShardState:
        """The shard at this moment."""
        with self._changed:
            return ShardState(
                round_number=self.number,
                version=self._policy.version,
                applied=self._policy.accepted.copy(),
                max_staleness_seen=self._policy.max_staleness_seen,
                staleness=self._policy.staleness,
                late_gradients=self._policy.late,
                initialized=self._shard is not None and self._shard.initialized,
                shard_bytes=0 if self._shard is None else self._shard.nbytes,
                wait_seconds=self._waited,
                gradient_norms=self._norms.newest,
                workers=tuple(sorted(self._sessions)),
            )

    def _is_before(self, step: int | None) -> bool:
        return self._policy.waits_for_norm and step is not None and self._policy.version < step

    def _parts_of(self, index: int) -> tuple[int, int]:
        """The parts of the update that this one completes."""
        first = index - index % self._parts_per_step if self._sync else index
        return first, first + (self._parts_per_step if self._sync else 1)

    def _forget_buffers(self) -> None:
        version = self._policy.version
        for old in [step for step in self._kept if step < version - 1 and step != self._saved]:
            del self._kept[old]

    def _weigh(self, gradient: Gradient) -> float:
        """The weight of a gradient in its update. Async: each one is an update of its own, whatever it weighs; it may be clipped."""
        self._took.append(gradient.took)
        if not self._sync:
            return clipping.coefficient(gradient.norm, self._clip) if self._clip and gradient.norm is not None else 1.0
        own = gradient.weight is not None
        weight = (gradient.weight if gradient.weight is not None else gradient.samples) / gradient.batch_samples
        self._weights[gradient.index] = weight
        self._owned = self._owned or own
        return weight

    def _divisor(self) -> float:
        total = math.fsum(self._weights.values()) if self._owned else 1.0
        self._weights.clear()
        self._owned = False
        return total or 1.0

    def _all_took(self, shard: Shard) -> Took:
        lengths = [span.length for span in shard.spans]
        took: Took = tuple(() for _ in lengths)
        for each in self._took:
            took = union(took, each, lengths)
        self._took.clear()
        return took

    def _build(self, layout: Layout) -> Shard:
        shard, shards = self._place
        return Shard(layout=layout, server=shard, servers=shards, optimizer=self._optimizer, history=self._sync)

    def _know_groups(self, shard: Shard, groups: Groups) -> None:
        """Every worker has the same ones: they follow from the layout's names and the job."""
        if not self.knows_groups:
            shard.assign(groups)
            self.groups, self.knows_groups = groups, True

    def _may_start(self, session: Session, clock: int, step: int | None) -> bool:
        self._require_current(session)
        if not self._known_shard().initialized:
            return False
        try:
            return self._policy.start(session.rank, clock, step)
        except consistency.OutOfStep as error:
            raise Refusal(Reason.MISTAKE, str(error)) from None

    def _reason(self, step: int | None) -> str:
        return self._policy.waits_for(step) if self._known_shard().initialized else "the first worker's parameters"

    def _require_going_on(self) -> None:
        if self.over:
            raise Refusal(Reason.ROUND, f"round {self.number} is over")

    def _require_current(self, session: Session) -> None:
        self._require_going_on()
        if self._sessions.get(session.rank) is not session:
            raise Refusal(Reason.STRANGER, f"worker {session.rank} was dropped, or connected again")

    def _known_shard(self) -> Shard:
        if self._shard is None:
            raise Refusal(Reason.MISTAKE, "this shard has no layout yet")
        return self._shard
