"""Pipeline parallel: a part of a batch flows in micro-batches through the stages that a model is cut into.

The schedules are torch's (torch.distributed.pipelining). Its stages learn once which shapes they exchange, so each shape of a
micro-batch has stages of its own: the smaller last batch, and texts of another length. Where a schedule does not take the number of
micro-batches of the remainder, all of them go forward and then backward.

A loss is called as in one process, `loss(model, batch)`, with a stand-in for the model. In the first stage the stand-in notes what the
model is called with; in the last one it returns what came through the pipeline.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)

from disttrain.api.strategy import ModelParallel, Schedule
from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.errors import UserError
from disttrain_trainer.model.named_values import Values
from disttrain_trainer.model.objective import Loss, Objective
from disttrain_trainer.model.precision import UNCHANGED, Autocast
from disttrain_trainer.parallel import micro_batches, stages
from disttrain_trainer.parallel.chance import Chance
from disttrain_trainer.parallel.pipeline_forward import PipelineForward
from disttrain_trainer.runtime.weighted_means import WeightedMeans

_SHAPES: Final = 8
"""Shapes of micro-batches whose stages are kept."""


class Pipeline:
    """One process of a pipeline: forward and backward of a part. For one thread; all processes call it for the same parts in turn."""

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        *,
        cut: ModelParallel,
        group: dist.ProcessGroup,
        microbatch: int,
        loss: Loss,
        chance: Chance,
        device: torch.device,
        autocast: Autocast = UNCHANGED,
    ) -> None:
        """modules: the stages of this process, by number. microbatch: samples of one."""
        self.modules = tuple(modules.values())
        self._own = dict(modules)
        self._group = group
        self._cut = cut
        self._count = count = stages.count(cut)
        self._size = microbatch
        self._device = device
        self._part = _Part(chance, loss, autocast)
        self.values: Values | None = None
        """See LossOf. Only where the last stage is."""
        self._stages = {
            number: _Stage(
                stage,
                self._part,
                number=number,
                is_last=number == count - 1,
                asks_gradient=cut.schedule is Schedule.ZERO_BUBBLE,
            )
            for number, stage in modules.items()
        }
        self._made: dict[Any, PipelineScheduleSingle | PipelineScheduleMulti] = {}

    def begin(self, part: BatchPart) -> None:
        """Before the batch of a part, or of a portion of one: call it for each of them, in their order."""
        current = self._part
        current.first = current.first + len(current.pieces) if part.batch else 0
        current.number, current.batch_samples = part.index, part.batch_samples
        current.pieces = micro_batches.slices(part.samples, self._size)

    def forward_model(self) -> PipelineForward:
        """The model as an evaluation calls it, on every process of the pipeline."""
        return PipelineForward(self._own, cut=self._cut, group=self._group, device=self._device)

    def learned_nothing(self) -> None:
        """See LossOf."""
        self._part.objective.learned_nothing()

    def __call__(self, batch: Any, samples: int) -> tuple[torch.Tensor, float | None]:
        """Adds to the gradients those of the part's sum of losses / the samples of the whole batch: a loss counts as many times as its
        micro-batch has samples, or as its own weight says. Returns the part's mean loss; and its weight, None where there is none. Only the
        process of the last stage knows both: elsewhere they are 0 and None.

        Raises UserError, what the user's code raises, and BrokenGroup.
        """
        current = self._part
        current.batches = [micro_batches.cut(batch, samples, piece) for piece in current.pieces]
        current.losses, current.values = {}, {}
        for shape, numbers in groupby(
            range(len(current.batches)), key=lambda number: micro_batches.shape(current.batches[number])
        ):
            self._run(shape, list(numbers))
        self.values = _mean_values(current.values.values())
        return self._mean(current.losses.values())

    def _run(self, shape: Any, numbers: list[int]) -> None:
        schedule = self._made.pop((shape, len(numbers)), None) or self._make(len(numbers))
        self._made[shape, len(numbers)] = schedule
        if len(self._made) > _SHAPES:
            del self._made[next(iter(self._made))]
        each = [torch.tensor(number) for number in numbers]
        try:
            schedule.step(
                arg_mbs=[(number,) for number in each] if 0 in self._stages else None,
                kwarg_mbs=[{"microbatch": number} for number in numbers],
                target_mbs=each if self._count - 1 in self._stages else None,
                return_outputs=False,
            )
        except RuntimeError as error:
            # torch wraps what a stage raises, and shows the tensors that it was called with.
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise

    def _make(self, microbatches: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        own: list[Any] = [
            PipelineStage(stage, number, self._count, self._device, group=self._group)
            for number, stage in self._stages.items()
        ]
        options: dict[str, Any] = {"loss_fn": lambda loss, _: loss, "scale_grads": False}
        match self._cut.schedule if self._cut.takes(microbatches) else None:
            case Schedule.ONE_FORWARD_ONE_BACKWARD:
                return Schedule1F1B(own[0], microbatches, **options)
            case Schedule.INTERLEAVED:
                return ScheduleInterleaved1F1B(own, microbatches, **options)
            case Schedule.ZERO_BUBBLE:
                return ScheduleInterleavedZeroBubble(own, microbatches, **options)
        if len(own) > 1:
            return ScheduleLoopedBFS(own, microbatches, **options)
        return ScheduleGPipe(own[0], microbatches, **options)

    def weight_of_last(self, weight: float | None) -> float | None:
        """The weight that the process of the last stage got of the part, in every process: all call it, each with the weight that it got.

        Raises BrokenGroup's cause.
        """
        sums = torch.tensor([weight or 0.0, float(weight is not None)], dtype=torch.float64, device=self._device)
        dist.all_reduce(sums, group=self._group)
        total, own = sums.tolist()
        return total if own else None

    def _mean(self, losses: Iterable[tuple[torch.Tensor, int, float | None]]) -> tuple[torch.Tensor, float | None]:
        """The mean and the weight of all micro-batches."""
        sums = torch.zeros((), dtype=torch.float64, device=self._device)
        total, is_own = 0.0, False
        for loss, samples, weight in losses:
            counted = samples if weight is None else weight
            if counted:
                sums += loss.double() * counted
                total, is_own = total + counted, is_own or weight is not None
        return sums / (total or 1.0), total if is_own else None


def _mean_values(each: Iterable[tuple[Values, float]]) -> Values | None:
    """Those of a part from those of its micro-batches."""
    means = WeightedMeans()
    for values, weight in each:
        means.add({name: float(value) for name, value in values.items()}, weight)
    return means.means or None


class _Part:
    """The part that is computed.

    pieces, batches: of its micro-batches. first: the number of the first of these in the part, where this is a portion of one.
    losses: (mean, samples, weight) of each, where the last stage is; values: those of each, and their weight. By number: torch runs the
    last stage once more to see its shapes.
    """

    def __init__(self, chance: Chance, loss: Loss, autocast: Autocast) -> None:
        self.chance = chance
        self.autocast = autocast
        self.stand_in = _StandIn(chance)
        self.objective = Objective(self.stand_in, autocast.loss(loss))
        self.loss = loss
        self.number = self.first = 0
        self.batch_samples = 1
        self.batches: list[Any] = []
        self.pieces: list[slice] = []
        self.losses: dict[int, tuple[torch.Tensor, int, float | None]] = {}
        self.values: dict[int, tuple[Values, float]] = {}


class _Noted(BaseException):
    """The loss has called the model: how. Not an Exception, which a loss may catch."""

    def __init__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.arguments, self.keywords = arguments, keywords


class _StandIn(nn.Module):
    """What a loss gets for the model: see the module's text."""

    def __init__(self, chance: Chance) -> None:
        super().__init__()
        self._chance = chance
        self.outputs: list[Any] | None = None
        """What the model gives, for one call; None where the call is noted."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if self.outputs is None:
            raise _Noted(arguments, keywords)
        if not self.outputs:
            raise UserError(
                "trainer.loss calls the model twice for one batch, which a pipeline cannot do: call it once"
            )
        self._chance.after_model()
        return self.outputs.pop()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"trainer.loss reads model.{name}: in a pipeline the loss may only call the model"
            ) from None


class _Stage(nn.Module):
    """A stage as torch's schedules call it: with the number of the micro-batch, and what the stage before gave.

    It shows torch the parameters and buffers of its module, but not the module: torch's stage lets go of what FSDP2 has gathered in the
    modules that it finds, when it is made and after its first look at shapes, and both are in the middle of a step here.
    """

    def __init__(self, module: nn.Module, part: _Part, *, number: int, is_last: bool, asks_gradient: bool) -> None:
        """asks_gradient: also where nothing in front of the next stage is trained. The zero bubble's schedule of torch 2.15 computes the
        gradient of a stage's parameters only if its input has one, too."""
        super().__init__()
        self._hidden = (module,)
        self._part = part
        self._number = number
        self._is_last = is_last
        self._asks_gradient = asks_gradient

    @property
    def module(self) -> nn.Module:
        return self._hidden[0]

    def named_parameters(self, *arguments: Any, **keywords: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(*arguments, **keywords)

    def named_buffers(self, *arguments: Any, **keywords: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return self.module.named_buffers(*arguments, **keywords)

    def forward(self, *received: torch.Tensor, microbatch: int) -> Any:
        part = self._part
        part.chance.begin(part.number, part.first + microbatch)
        arguments, keywords = (received, {}) if self._number else self._call(part.batches[microbatch])
        with part.autocast.context():
            output = self.module(*arguments, **keywords)
        if self._is_last:
            return self._loss(output, received, microbatch)
        if not isinstance(output, torch.Tensor) and not (
            isinstance(output, tuple | list) and all(isinstance(one, torch.Tensor) for one in output)
        ):
            raise UserError(
                f"trainer.model: stage {self._number} of the pipeline returned a {type(output).__name__}; expected a tensor, or a tuple of "
                "tensors, with which the next stage is called"
            )
        if self._asks_gradient:
            outputs = (output,) if isinstance(output, torch.Tensor) else output
            return tuple(one.requires_grad_() if one.is_floating_point() else one for one in outputs)
        return output

    def _call(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the loss calls the model with."""
        self._part.stand_in.outputs = None
        try:
            self._part.loss(self._part.stand_in, batch)
        except _Noted as noted:
            return noted.arguments, noted.keywords
        raise UserError("trainer.loss does not call the model, which a pipeline needs: call it once, as model(...)")

    def _loss(self, output: Any, received: Sequence[torch.Tensor], microbatch: int) -> torch.Tensor:
        """The micro-batch's share in the mean of the whole batch, of which torch computes the gradient."""
        part = self._part
        part.chance.begin(part.number, part.first + microbatch)
        part.stand_in.outputs = [output]
        piece = part.pieces[microbatch]
        samples: int = piece.stop - piece.start
        loss, weight = part.objective(part.batches[microbatch], samples)
        part.losses[microbatch] = loss.detach(), samples, weight
        if part.objective.values:
            part.values[microbatch] = part.objective.values, samples if weight is None else weight
        if weight == 0:
            # Of no elements: its gradient is zero, whatever the loss is.
            tensors = [*(one for one in received if one.requires_grad), *self.module.parameters()]
            return next(tensor.flatten()[:0].sum() for tensor in tensors if tensor.requires_grad)
        return loss * ((samples if weight is None else weight) / part.batch_samples)
