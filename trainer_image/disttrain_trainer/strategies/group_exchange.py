"""The exchange of Hybrid with parameter servers: a group gets a part from the master, each rank pushes what it owns of the gradient.

The first rank of the group talks to the master, and tells the others which part comes next (group_orders.py). A part is reported as done
when the servers have it from all ranks.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from disttrain_trainer.data.inner_batches import Portions
from disttrain_trainer.data.loading import Loading
from disttrain_trainer.data.schedule import BatchPart, Schedule
from disttrain_trainer.errors import PeerLost
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.loop.meter import NonFiniteLoss
from disttrain_trainer.model.flat import Vectors, norm
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.group_member import GroupMember
from disttrain_trainer.parallel.agreement import require_equal_gradients
from disttrain_trainer.parallel.mesh import Groups
from disttrain_trainer.parallel.pipeline import Pipeline
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.parameter_server.assignments import Assignments
from disttrain_trainer.parameter_server.client import WHOLE, GradientInfo, ShardedClient
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.strategies.group_buffers import StepBuffers
from disttrain_trainer.strategies.group_orders import SIGN_OF_LIFE_SECONDS, Order, Orders, Told
from disttrain_trainer.strategies.group_values import GroupValues

IDLE_SECONDS = 0.02
"""Seconds without an assignment after which a group leaves, so that no other worker waits for it."""


class PartNotFinite(Exception):
    """The loss of a part is not finite. Raised on every rank of the group."""

    def __init__(self, part: BatchPart, error: NonFiniteLoss | None) -> None:
        """error: of the rank that has computed the loss."""
        super().__init__(f"the loss of part {part.index} is not finite")
        self.part = part
        self.error = error


@dataclass(slots=True, eq=False)
class GroupModel:
    """A rank's part of the model, as it is made once in a process group."""

    model: ShardedModel
    pipeline: Pipeline | None
    values: GroupValues
    buffers: StepBuffers
    trained: bool = False
    """Whether its values are no longer those of a new model."""
    proved: bool = False
    """Whether the gradients of the tensor axis were compared."""


class GroupPushPull:
    """The Exchange of one rank in one round: one part at a time. Its methods raise PeerLost, on all ranks of the group alike."""

    def __init__(
        self,
        *,
        control: ControlClient,
        member: GroupMember,
        metrics: Metrics,
        orders: Orders,
        assignments: Assignments,
        client: ShardedClient,
        loop: TrainingLoop,
        schedule: Schedule,
        portions: Portions,
        own: GroupModel,
        groups: Groups,
        plan_field: str,
        computed_in: torch.dtype,
        clips: bool,
        goes_back: bool,
        is_sync: bool,
        every: int,
        save: Callable[[], None],
        collect: Callable[[], None],
        between: Callable[[int], None],
        keep: Callable[[int], None],
        evaluate: Callable[[int], None],
        on_part: Callable[[], None],
        loading: Loading | None = None,
    ) -> None:
        """assignments: used by the first rank. every: steps between two checkpoints, 0 for none. on_part: called after each part that the
        servers have. plan_field: the field by which layers are cut. computed_in: the coarsest dtype of a step, where that is coarser than a
        parameter's. goes_back: the job has a nanPolicy: the ranks of a group agree on whether a loss is finite.

        save: carries out the master's order on the first rank; collect: on all, where it needs the buffers of all. between: on all, the
        evaluation of a step while others train on; keep: the parameters are those of this step, which may be evaluated. evaluate: on all,
        the parameters after so many steps.
        """
        self._control = control
        self._member = member
        self._metrics = metrics
        self._orders = orders
        self._assignments = assignments
        self._client = client
        self._loop = loop
        self._watch = loop.stopwatch
        self._schedule = schedule
        self._portions = portions
        self._own = own
        self._groups = groups
        self._plan_field = plan_field
        self._computed_in = computed_in
        self._clips = clips
        self._goes_back = goes_back
        self._is_sync = is_sync
        self._every = every
        self._save = save
        self._collect = collect
        self._between = between
        self._keep = keep
        self._evaluate = evaluate
        self._on_part = on_part
        self._loading = loading
        self._participates = False
        self._part: BatchPart
        """What is computed."""
        self._total, self._is_weighed = 0.0, False
        """What its portions weigh together: samples, or as the losses say."""

    def next_parts(self) -> Sequence[BatchPart]:
        """The portions of one part, with the parameters and, under Sync, the buffers of its step."""
        while True:
            told = self._next() if self._orders.leads else self._orders.hear()
            match told.order:
                case Order.PART:
                    part = self._schedule.part(told.number)
                    if self._loading is not None:
                        self._loading.foresee((told.number,), (told.following,) if told.following >= 0 else ())
                    if self._begin(part):
                        return self._portions.of(part)
                    self._finished(part, time.perf_counter())  # its step is over: another group computed the part
                case Order.NOTHING:
                    self._rest()
                case Order.COLLECT:
                    self._collect()
                case Order.BETWEEN:
                    self._loop.report()
                    if self._participates:
                        self._orders.together(self._leave)
                    self._participates = False
                    self._between(told.number)
                case Order.EVALUATE:
                    self._loop.report()
                    self._evaluate(told.number)
                    self._participates = False
                case _:
                    self._loop.report()
                    return ()

    def before(self, part: BatchPart) -> BatchPart | None:
        """Nothing for a part without samples."""
        if part.samples and self._own.pipeline is not None:
            self._own.pipeline.begin(replace(part, batch_samples=self._part.samples))
        return part if part.samples else None

    def weigh(self, loss: torch.Tensor, part: BatchPart, weight: float | None) -> torch.Tensor | None:
        """The mean loss of the part, or a portion's share in it: the servers know what the part counts in the step."""
        if self._own.pipeline is not None:
            weight = self._own.pipeline.weight_of_last(weight)
        counts = part.samples if weight is None else weight
        self._total, self._is_weighed = self._total + counts, self._is_weighed or weight is not None
        self._own.values.refuse_changed()
        if self._own.pipeline is not None or weight == 0:
            return None  # it has gone backward, or counts for nothing
        self._own.model.before_backward(counts=True)
        share = counts / self._part.samples if self._sums else 1.0
        if isinstance(loss, DTensor):  # of loss_parallel(), which the loss has left: its backward needs it again
            with loss_parallel():
                (loss.full_tensor() * share).backward()  # type: ignore[no-untyped-call]
            return None
        return loss * share

    def after(self, part: BatchPart) -> None:
        pass

    def complete(self) -> bool:
        """Pushes what this rank owns of the gradient, and waits until the servers have it from all ranks of the group.

        Raises PartNotFinite.
        """
        part, client, own = self._part, self._client, self._own
        if self._goes_back:
            error = self._loop.take_not_finite()
            (failures,) = self._orders.count(error is not None)
            if failures:
                raise PartNotFinite(part, error)
        own.buffers.leave(part)
        gradients, info, took = self._gradients(part) if part.samples else (None, WHOLE, True)
        self._watch.lap("backward")

        def push() -> float:
            own.buffers.keep(client, part)
            client.push(part, gradients, info)
            return float(took)

        learning = self._orders.together(push)
        self._metrics.version = client.versions[0]
        self._watch.lap("communicate")
        self._finished(part, self._watch.now)
        return not part.samples or not self._total or bool(learning)

    def step_done(self, *, reported: bool) -> None:
        """The first rank tells the master which parts are done, at once when a checkpoint is due."""
        if self._orders.leads and (reported or (self._every and (self._part.step + 1) % self._every == 0)):
            self._assignments.request(force=True)

    def _begin(self, part: BatchPart) -> bool:
        """Pulls the parameters of a part. False when its step is over."""
        self._watch.start()
        self._part, client, own = part, self._client, self._own

        def pull() -> float:
            if not self._participates:
                client.join()
            versions = client.pull(own.values.parameters, step=part.step if self._is_sync else None)
            is_current = not self._is_sync or all(version == part.step for version in versions)
            return float(not (is_current and own.buffers.take(client, part.step)))

        own.trained = True  # on all ranks alike, whichever of them fails
        lacking = self._orders.together(pull)
        self._participates = True
        if lacking:
            return False
        own.values.put_in()
        self._keep(part.step)
        self._total, self._is_weighed = 0.0, False
        self._watch.lap("communicate")
        return True

    def _gradients(self, part: BatchPart) -> tuple[Vectors, GradientInfo, bool]:
        """The packed gradient of the part's mean loss; what it is of; whether a parameter of this rank took part."""
        own, total = self._own, self._total
        took = own.model.took_part if total else frozenset[int]()
        scale = part.samples / total if self._sums and self._is_weighed and total else 1.0
        gradients = own.values.gradients(scale=scale)
        axis = self._groups.mesh["tensor"]
        if not own.proved and axis.size() > 1 and total:
            require_equal_gradients(
                own.values.shared_gradients(),
                group=axis.get_group(),
                size=axis.size(),
                field=self._plan_field,
                computed_in=self._computed_in,
            )
            own.proved = True
        runs, whole = own.values.runs(took), None
        if self._clips and not self._is_sync:  # each gradient is an update of its own
            (square,) = self._orders.count(norm(gradients) ** 2)
            whole = self._metrics.gradient_norm = math.sqrt(square)
        weight = total if self._is_weighed else None
        return gradients, GradientInfo(weight=weight, runs=runs, clips=whole is not None, norm=whole), bool(took)

    @property
    def _sums(self) -> bool:
        """Whether backward leaves the sum over portions or micro-batches, by what they weigh, / the samples; else that of the mean."""
        return self._own.pipeline is not None or self._portions.count > 1

    def _finished(self, part: BatchPart, now: float) -> None:
        if self._orders.leads:
            self._assignments.finished(part.index, now - self._watch.began)
        self._on_part()

    def _rest(self) -> None:
        """There is no part: no other worker waits for this group."""
        self._loop.report()  # the wait may be long, and the parts that are computed would not be counted meanwhile
        if self._participates:
            self._orders.together(self._leave)
        self._participates = False

    def _leave(self) -> float:
        self._client.leave()
        return 0.0

    def _next(self) -> Told:
        """The first rank: what the group does next. Carries out the master's orders that need no other rank."""
        control, member, assignments, orders = self._control, self._member, self._assignments, self._orders

        def something_new() -> bool:
            called = member.evaluate or member.save is not None or member.between is not None
            return called or assignments.following is not None or assignments.is_over

        while not assignments.is_over:
            control.check()
            if member.save is not None:
                if not self._is_sync:
                    return orders.tell(Order.COLLECT)
                try:
                    self._save()
                except PeerLost:
                    orders.tell(Order.LEAVE)
                    raise
            with control.changed:
                step, member.between = member.between, None
            if step is not None and not assignments.is_over:
                return orders.tell(Order.BETWEEN, step)
            assignments.request()
            if (index := assignments.take()) is not None:
                following = assignments.following
                return orders.tell(Order.PART, index, -1 if following is None else following)
            assignments.request(force=True)
            with control.changed:
                seconds = IDLE_SECONDS if self._participates else SIGN_OF_LIFE_SECONDS
                is_idle = not control.changed.wait_for(something_new, seconds)
                evaluates = member.evaluate and not assignments.is_over
                member.evaluate = member.evaluate and not evaluates
            if evaluates:
                last = member.last_step
                return orders.tell(Order.EVALUATE, self._schedule.total_steps if last is None else last)
            if is_idle:
                return orders.tell(Order.NOTHING)
        return orders.tell(Order.LEAVE)
