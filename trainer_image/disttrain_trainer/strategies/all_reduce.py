"""The exchange of DataParallel: each rank computes its parts of every step, and gradients are averaged, weighted by samples."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from disttrain_trainer.data.inner_batches import Portions
from disttrain_trainer.data.schedule import BatchPart, parts_of
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.model import clipping
from disttrain_trainer.model.factory_optimizer import FactoryOptimizer
from disttrain_trainer.model.flat import FlatModel, norm
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.model.part_buffers import PartBuffers
from disttrain_trainer.model.task import Task
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.parallel.replicate import Replicated
from disttrain_trainer.parallel.shared_buffers import SharedBuffers
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.evaluations import RankEvaluations
from disttrain_trainer.strategies.rank import RoundEnded
from disttrain_trainer.strategies.rank_checkpoints import RankCheckpoints
from disttrain_trainer.strategies.streaming import Streaming


class AllReduce:
    """The Exchange of one rank in one round: the model's state is `member.step` steps old, and every rank has the same."""

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
        model: FlatModel,
        optimizer: FlatOptimizer | FactoryOptimizer,
        replica: Replicated | None,
        reshare: Callable[[], SharedBuffers | None],
        checkpoints: RankCheckpoints | None,
        evaluations: RankEvaluations | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        """replica: the sums over the ranks; None for a rank that is alone.

        reshare: gives every rank the whole state of rank 0, after a step in which the form of a buffer has changed.
        """
        config = process.config
        place, size = this_round.place(process.rank), this_round.size(config.world_size)
        self._metrics = metrics
        self._control = control
        self._member = member
        self._round = this_round
        self._loop = loop
        self._watch = loop.stopwatch
        self._schedule = task.schedule
        self._loading = task.loading
        self._module = task.model
        self._model = model
        self._gradients = model.gradients()
        self._optimizer = optimizer
        self._rate = task.learning_rate
        self._replica = replica
        self._reshare = reshare
        self._checkpoints = checkpoints
        self._evaluations = evaluations
        self._streaming = streaming
        self._every = config.checkpoint.every_steps if config.checkpoint else 0
        self._parts_per_step = config.parts_per_step
        self._most = config.trainer.max_gradient_norm
        self._norm: float | None = None
        """Of the gradient of the last step, before the clip; None without a clip."""
        parts = parts_of(place, ranks=size, parts_per_step=config.parts_per_step)
        self._has_parts = bool(parts)
        # A rank without parts learns from a neighbour's which step it takes part in.
        self._parts = parts or range(parts.start - 1, parts.start)
        self._portions = Portions(config)
        self._several = len(parts) * self._portions.count > 1
        """Whether the gradients of several batches add up here."""
        buffers = PartBuffers(task.model)
        self._buffers = buffers if len(parts) > 1 and buffers.there_are_some else None
        self._joint = replica is not None and needs_all_ranks(task.model)
        self._stand_in = np.arange(min(2, task.schedule.samples))  # two: BatchNorm refuses one
        self._kept: dict[str, torch.Tensor] | None = None
        """The buffers before a stand-in was computed."""
        self._counts = False
        """Whether the gradient of the part counts; a gradient that does not is thrown away."""
        self._total = 0.0
        """What this rank's gradient counts in the sum over ranks: that is the mean over the samples of the step."""
        self.ended = False
        """The round is over after this step, on all ranks the same: members of an elastic job join or leave."""
        self._own = False
        """Whether a loss of the step came with a weight of its own."""

    def next_parts(self) -> Sequence[BatchPart]:
        """Raises RoundEnded."""
        step = self._member.step
        if step >= self._schedule.total_steps or self.ended:
            return ()
        if self._member.round is not self._round:
            raise RoundEnded
        if self._evaluations is not None and not self._evaluations.before_step(step):
            return ()
        self._watch.start()
        if self._buffers is not None:
            self._buffers.begin()
        self._total, self._own = 0.0, False
        if self._loading is not None and self._has_parts:
            self._loading.foresee_steps(step, self._parts)
        first = step * self._parts_per_step
        parts = [self._schedule.part(first + number) for number in self._parts]
        return parts if self._portions.count == 1 else [one for part in parts for one in self._portions.of(part)]

    def before(self, part: BatchPart) -> BatchPart | None:
        """The part; for one without samples, where the model needs all ranks in each forward and backward, a stand-in."""
        if not self._has_parts:
            return None
        if self._buffers is not None and not part.batch and not self._is(part, self._parts[0]):
            self._buffers.restore()
        if part.samples:
            return part
        if not self._joint:
            if self._buffers is not None:
                self._buffers.left(step=part.step, part=part.index % self._parts_per_step - self._parts[0])
            return None
        self._kept = copies_of_buffers(self._module)
        return replace(part, indices=self._stand_in)

    def weigh(self, loss: torch.Tensor, part: BatchPart, weight: float | None) -> torch.Tensor | None:
        """The loss x its share in the mean of the step; the loss, where it counts for nothing and the other ranks need this backward."""
        replica = self._replica
        share = part.samples / part.batch_samples
        if part.samples and weight is not None:
            share, self._own = weight / part.batch_samples, True
        self._counts = bool(share)
        if not share:
            if replica is None or not self._joint or not loss.requires_grad:
                return None
            replica.begin(loss, early=False)
            return loss
        self._total += share
        if self._several:
            self._model.refuse_cleared()
        if replica is not None:
            loss = loss * share
            replica.begin(loss, early=self._ends_step(part))
        elif self._several:
            loss = loss * share
        return loss

    def after(self, part: BatchPart) -> None:
        if self._joint and not self._counts:
            self._model.zero_grad()
        if self._kept is not None:
            put_back(self._module, self._kept)  # only now: backward may need the buffers that forward left
            self._kept = None
        if self._counts and not self._ends_step(part):
            self._model.gradients()
        if self._buffers is not None and part.is_last:
            self._buffers.left(step=part.step, part=part.index % self._parts_per_step - self._parts[0])

    def complete(self) -> bool:
        """Averages the gradients over all ranks, and updates the parameters. Raises BrokenGroup."""
        if self._buffers is not None:
            self._buffers.advance()
        replica, watch, total = self._replica, self._watch, self._total
        if replica is None:
            self._model.gradients()
            took_part = self._model.took_part
            if self._several and self._own and total:
                for vector in self._gradients:
                    vector.mul_(1 / total)
            self.ended = self._member.resize_asked
            watch.lap("backward")
        else:
            took_part = replica.finish(
                weight=total, own=self._own, alive=self._is_alive, ending=self._member.resize_asked
            )
            self.ended = replica.ending
            if replica.reshaped:
                replica.buffers = self._reshare()
            watch.lap("backward", until=replica.sent)
            watch.lap("communicate")
        if self._most is not None:
            self._norm = clipping.clip(self._gradients, self._most)
        self._optimizer.step(self._gradients, took_part, rate=self._rate.factor(self._member.step))
        self._member.step += 1
        watch.lap("optimize")
        return not total or took_part is None or any(took_part)

    def step_done(self, *, reported: bool) -> None:
        """Saves a checkpoint that is due or that the master asked for."""
        member, checkpoints = self._member, self._checkpoints
        is_last = member.step == self._schedule.total_steps
        is_due = member.save_asked or (self._every and member.step % self._every == 0 and not is_last)
        if self._streaming is not None and (is_due or is_last):
            self._streaming.save(member.step)
        saving = checkpoints if is_due else None
        if saving is not None:
            reported = self._loop.before_save(waits=saving.busy, reported=reported)
        if reported:
            self._metrics.gradient_norm = norm(self._gradients) if self._norm is None else self._norm
            self._control.check()
            if checkpoints is not None:
                checkpoints.check()
        if saving is not None:
            saving.save()

    def _ends_step(self, part: BatchPart) -> bool:
        """Whether no gradient of the step comes after that of this part or portion."""
        return part.is_last and self._is(part, self._parts[-1])

    def _is(self, part: BatchPart, number: int) -> bool:
        return part.index % self._parts_per_step == number

    def _is_alive(self) -> bool:
        return self._member.round is self._round


def needs_all_ranks(model: nn.Module) -> bool:
    """Whether the model has collectives of its own in each forward and backward."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


def copies_of_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """For `put_back`."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def put_back(model: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    """Restores the buffers: a rank without samples computes on two arbitrary ones to join the all-reduce, and its BatchNorms must not learn
    from them."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
