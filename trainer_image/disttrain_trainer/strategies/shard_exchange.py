"""The exchange of a sharded model: gradients are summed over the data-parallel ranks as backward goes, each rank updates what it holds.

Every rank runs every forward and backward, for the others wait for its share of the parameters: one without samples computes on a
stand-in, whose gradient is 0. The last sum of a step is of a few numbers that all ranks need. A rank that has it knows that all gradients
are summed everywhere, so that ranks differ by a step only when they are lost in that very moment.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from disttrain.api.mesh import Mesh
from disttrain_trainer.data.inner_batches import Portions
from disttrain_trainer.data.schedule import BatchPart, parts_of
from disttrain_trainer.errors import UserError
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.model import clipping
from disttrain_trainer.model.part_buffers import PartBuffers
from disttrain_trainer.model.task import Task
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.parallel.agreement import require_equal_gradients
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.mesh import Groups
from disttrain_trainer.parallel.pipeline import Pipeline
from disttrain_trainer.parallel.shard_factory import ShardFactoryOptimizer
from disttrain_trainer.parallel.shard_optimizer import ShardOptimizer
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.parallel.shared_buffers import SharedBuffers
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.evaluations import RankEvaluations
from disttrain_trainer.strategies.rank import RoundEnded
from disttrain_trainer.strategies.shard_checkpoints import ShardCheckpoints


class ShardExchange:
    """The Exchange of one rank in one round: the model's state is `member.step` steps old, on every rank."""

    def __init__(
        self,
        *,
        process: Process,
        metrics: Metrics,
        control: ControlClient,
        member: CollectiveMember,
        this_round: Round,
        loop: TrainingLoop,
        task: Task,
        mesh: Mesh,
        groups: Groups | None,
        model: ShardedModel,
        pipeline: Pipeline | None,
        optimizer: ShardOptimizer | ShardFactoryOptimizer,
        buffers: SharedBuffers | None,
        parameters: int,
        checkpoints: ShardCheckpoints | None,
        plan_field: str | None = None,
        computed_in: torch.dtype = torch.float32,
        evaluations: RankEvaluations | None = None,
    ) -> None:
        """groups: None for a rank that is alone. buffers: those of this rank's part of the model. parameters: trained ones of the whole.

        plan_field: the field by which layers are cut, where the gradients of the first step are compared over the tensor axis.
        computed_in: the coarsest dtype of a step, where that is coarser than a parameter's.
        """
        config = process.config
        self._metrics = metrics
        self._control = control
        self._member = member
        self._round = this_round
        self._loop = loop
        self._watch = loop.stopwatch
        self._schedule = task.schedule
        self._loading = task.loading
        self._groups = groups
        self._unproved_plan = plan_field if mesh.tensor > 1 else None
        self._computed_in = computed_in
        self._model = model
        self._pipeline = pipeline
        self._optimizer = optimizer
        self._rate = task.learning_rate
        self._shared = buffers
        self._checkpoints = checkpoints
        self._evaluations = evaluations
        self._every = config.checkpoint.every_steps if config.checkpoint else 0
        self._parts_per_step = config.parts_per_step
        self._counts_weights = mesh.counts(process.rank)
        parts = parts_of(mesh.data_rank(process.rank), ranks=mesh.data, parts_per_step=config.parts_per_step)
        most = -(-config.parts_per_step // mesh.data)
        nearest = min(max(parts.start, 1), config.parts_per_step) - 1
        own = [*parts] or [nearest]
        self._own_parts = len(parts)
        self._numbers = [*own, *[own[-1]] * (most - len(own))]
        """The parts that this rank computes, and as many stand-ins as the others have parts more."""
        self._portions = Portions(config)
        self._position = 0
        """Portions of the parts of the step that were begun; 0 between two steps."""
        self._stand_in = np.arange(min(2, task.schedule.samples))  # two: BatchNorm refuses one
        part_buffers = PartBuffers(model.module)
        self._buffers = part_buffers if part_buffers.there_are_some else None
        self._counts = False
        self._total = 0.0
        self._own = False
        self._save_due = False
        self._square = 0.0
        """Of the norm of the step's gradient, before the clip."""
        self._most = config.trainer.max_gradient_norm
        self._whole = tuple(piece for piece in model.trained if not piece.is_cut)
        self._parameters = parameters
        self._device = model.pieces[0].local.device if model.pieces else torch.device("cpu")

    def next_parts(self) -> Sequence[BatchPart]:
        """Raises RoundEnded."""
        step = self._member.step
        if step >= self._schedule.total_steps:
            return ()
        if self._member.round is not self._round:
            raise RoundEnded
        if self._evaluations is not None and not self._evaluations.before_step(step):
            return ()
        self._watch.start()
        if self._buffers is not None:
            self._buffers.begin()
        self._total, self._own, self._position = 0.0, False, 0
        if self._loading is not None:
            self._loading.foresee_steps(step, self._numbers[: self._own_parts])
        if self._pipeline is not None:
            self._gather()
        first = step * self._parts_per_step
        parts = [self._schedule.part(first + number) for number in self._numbers]
        return parts if self._portions.count == 1 else [one for part in parts for one in self._filled(part)]

    def _filled(self, part: BatchPart) -> list[BatchPart]:
        """The portions of a part, and as many stand-ins as it has portions less than others: ranks compute equally many."""
        portions = list(self._portions.of(part))
        idle = replace(part, samples=0, indices=part.indices[:0], batch=1, is_last=False)
        return portions + [idle] * (self._portions.count - len(portions))

    def before(self, part: BatchPart) -> BatchPart | None:
        """The part, or a stand-in where this rank has none, or one without samples."""
        position, self._position = self._position, self._position + 1
        number, portion = divmod(position, self._portions.count)
        if number and not portion and self._buffers is not None:
            self._buffers.restore()
        is_real = number < self._own_parts and bool(part.samples)
        if self._pipeline is not None:
            if is_real:
                self._pipeline.begin(part)
                return part
            if not position and self._buffers is not None:
                self._buffers.left(step=part.step, part=0)
            return None  # ranks of other data-parallel members do not wait for it
        if is_real:
            return part
        return replace(part, indices=self._stand_in, samples=0)

    def weigh(self, loss: torch.Tensor, part: BatchPart, weight: float | None) -> torch.Tensor | None:
        """The loss x its share in the mean of the step; a loss that counts for nothing where the other ranks need this backward."""
        share = part.samples / part.batch_samples
        if part.samples and weight is not None:
            share, self._own = weight / part.batch_samples, True
        self._total += share
        if self._pipeline is not None:
            return None  # it has gone backward
        self._counts = bool(share)
        self._model.before_backward(counts=self._counts)
        if not loss.requires_grad:
            raise UserError(
                "trainer.loss returned a loss of weight 0 that no parameter can learn from: with a sharded model every worker must run "
                "backward for the others; compute it from the model's output, and return the weight 0 beside it"
            )
        if isinstance(loss, DTensor):  # of loss_parallel(), which the loss has left: its backward needs it again
            with loss_parallel():
                (loss.full_tensor() * (share if self._counts else 1.0)).backward()  # type: ignore[no-untyped-call]
            return None
        return loss * share if self._counts else loss

    def after(self, part: BatchPart) -> None:
        if self._buffers is not None and part.is_last:
            self._buffers.left(step=part.step, part=(self._position - 1) // self._portions.count)

    @torch.no_grad()  # around all of it: DTensor.to_local() then is an attribute, and no node of a graph
    def complete(self) -> bool:
        """Waits for the sums of the step, and updates what lies here. Raises BrokenGroup."""
        watch, model = self._watch, self._model
        if self._buffers is not None:
            self._buffers.advance()
        watch.lap("backward")
        total, owned, took_part = self._sum_up()
        watch.lap("communicate")
        scale = 1 / total if owned and total else 1.0
        if self._most is not None:
            scale *= clipping.coefficient(self._square**0.5, self._most)
        if scale != 1.0:
            gradients = [one for piece in model.trained if (one := model.gradient(piece)) is not None]
            if gradients:
                torch._foreach_mul_(gradients, scale)  # one call, for there may be hundreds
        try:
            self._optimizer.step(took_part if total else (), rate=self._rate.factor(self._member.step))
        except Exception:
            self._member.step = -1  # that of a factory may have lost a peer in the middle: this state is of no step
            raise
        self._member.step += 1
        self._position = 0
        watch.lap("optimize")
        return not total or bool(took_part)

    def step_done(self, *, reported: bool) -> None:
        """Saves a checkpoint that is due, or that the master asked rank 0 for."""
        member, checkpoints = self._member, self._checkpoints
        is_last = member.step == self._schedule.total_steps
        is_due = self._save_due or (self._every and member.step % self._every == 0 and not is_last)
        saving = checkpoints if is_due else None
        if saving is not None:
            reported = self._loop.before_save(waits=saving.busy, reported=reported)
        if reported:
            self._metrics.gradient_norm = self._square**0.5
            self._control.check()
            if checkpoints is not None:
                checkpoints.check()
        if saving is not None:
            saving.save(at_once=self._save_due)

    def restore_buffers(self) -> None:
        """After a step that broke: the buffers are those of the step's begin again."""
        if self._buffers is not None and self._position:
            self._buffers.restore()

    def _gather(self) -> None:
        try:
            self._model.gather()
        except RuntimeError as error:
            raise BrokenGroup(error) from None
        self._watch.lap("communicate")

    def _sum_up(self) -> tuple[float, bool, frozenset[int]]:
        """The weight of the step, whether some loss had one of its own, and the numbers of the parameters that took part on some rank."""
        model = self._model
        took_part = model.took_part
        if self._groups is None:
            self._save_due = self._member.save_asked
            self._square = _of_mean(model.gradient_square(), self._total, self._own)
            return self._total, self._own, took_part
        try:
            model.reduce()
            for piece in self._whole:
                self._sum_whole(piece.parameter)
            if self._unproved_plan is not None:
                self._compare_gradients(self._groups, self._unproved_plan)
                self._unproved_plan = None
            own = (self._total, float(self._own)) if self._counts_weights else (0.0, 0.0)
            took = (float(number in took_part) for number in range(self._parameters))
            # One small sum for all that every rank needs of the step; at the end one number for each trained parameter.
            notes = torch.tensor(
                [*own, float(self._member.save_asked), model.gradient_square(), *took],
                dtype=torch.float64,
                device=self._device,
            )
            if self._shared is not None:
                self._share_buffers(self._shared)
            dist.all_reduce(notes)
        except RuntimeError as error:
            raise BrokenGroup(error) from None
        weight, own, save, square, *counts = notes.tolist()
        self._save_due = bool(save)
        self._square = _of_mean(square, weight, bool(own))
        return weight, bool(own), frozenset(number for number, count in enumerate(counts) if count)

    def _sum_whole(self, parameter: torch.nn.Parameter) -> None:
        """Sums the gradient of a parameter that each data-parallel rank has whole."""
        assert self._groups is not None
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            if (
                gradient.placements != parameter.placements
            ):  # a norm of SequenceParallel has the sum over its own tokens
                gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
            gradient = gradient.to_local()
        if gradient.numel() and len(self._groups.data_ranks) > 1:
            dist.all_reduce(gradient, group=self._groups.data)

    def _compare_gradients(self, groups: Groups, field: str) -> None:
        """Raises WrongInput where ranks of a tensor group have other gradients for what they hold together."""
        if not self._total:
            return
        model, axis = self._model, groups.mesh["tensor"]
        shared = [(piece, model.gradient(piece)) for piece in model.trained if not piece.is_cut_by_layer]
        require_equal_gradients(
            shared, group=axis.get_group(), size=axis.size(), field=field, computed_in=self._computed_in
        )

    def _share_buffers(self, buffers: SharedBuffers) -> None:
        """Gives the data-parallel ranks the buffers that part 0 left, which the first of them computes."""
        assert self._groups is not None
        source = self._groups.data_ranks[0]
        gives = dist.get_rank() == source
        if not buffers.pack(gives=gives):
            raise UserError(
                "trainer.model: a buffer has changed its shape or type in a step: with a sharded model it keeps them; use another strategy"
            )
        if buffers.bytes.numel():
            dist.broadcast(buffers.bytes, source, group=self._groups.data)
            if not gives:
                buffers.take()


def _of_mean(square: float, weight: float, own: bool) -> float:
    """The squared norm of the mean gradient of a step, of that of the sum. own: the weights are the losses' own, and not 1 together."""
    return square / (weight * weight) if own and weight else square
