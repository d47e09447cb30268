"""Pipeline parallel: the model is cut into stages, and a part of a batch flows through them in micro-batches.

The schedules are torch's (torch.distributed.pipelining). Its stages learn once which shapes they exchange, so each shape of a
micro-batch has stages of its own: the smaller last batch, and texts of another length. Where a schedule does not take the number of
micro-batches of the remainder, all of them go forward and then backward.

A loss is called as in one process, `loss(model, batch)`, with a stand-in for the model. In the first stage the stand-in notes what the
model is called with; in the last one it returns what came through the pipeline.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any, Final

import numpy as np
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
from disttrain_trainer.errors import UserError, WrongInput
from disttrain_trainer.model.task import Loss, Objective
from disttrain_trainer.parallel.chance import Chance

Split = Callable[[nn.Module, int, dict[str, Any]], Any]
"""The user's trainer.pipelineSplit: (model, stages, config) -> the stages, in the order of forward."""

_SHAPES: Final = 8
"""Shapes of micro-batches whose stages are kept."""


def stages_of(cut: ModelParallel, rank: int) -> range:
    """The numbers of the stages of one process of a pipeline."""
    return range(rank, stages(cut), cut.pipeline)


def stages(cut: ModelParallel) -> int:
    """The stages of a pipeline; Interleaved: two in each process."""
    return cut.pipeline * (2 if cut.schedule is Schedule.INTERLEAVED else 1)


def split(model: nn.Module, count: int, *, config: dict[str, Any], by_user: Split | None) -> list[nn.Module]:
    """The `count` stages of a model, in the order of forward: they share its modules, and each tensor of its state is in exactly one.

    by_user: trainer.pipelineSplit; else the pieces of `model.pipeline_stages()` or of an nn.Sequential are joined to stages of about
    the same number of parameters. Raises WrongInput.
    """
    if by_user is not None:
        found = by_user(model, count, dict(config))
        if not isinstance(found, list | tuple | nn.ModuleList) or not all(isinstance(one, nn.Module) for one in found):
            raise WrongInput(
                f"trainer.pipelineSplit returned a {type(found).__name__}; expected a list of {count} torch.nn.Module"
            )
        if len(found) != count:
            raise WrongInput(
                f"trainer.pipelineSplit returned {len(found)} stages; expected {count}, as it was called with"
            )
        chosen = list(found)
    else:
        pieces, where = _pieces(model)
        costs = [sum(parameter.numel() for parameter in piece.parameters()) for piece in pieces]
        if sum(cost > 0 for cost in costs) < count:
            raise WrongInput(
                f"strategy.modelParallel.pipeline: {where} has {sum(cost > 0 for cost in costs)} members with parameters, and "
                f"{count} stages are needed: lower pipeline, or cut the model in trainer.pipelineSplit"
            )
        chosen = [nn.Sequential(*pieces[members.start : members.stop]) for members in cut(costs, count)]
    _check(model, chosen)
    return chosen


def cut(costs: Sequence[int], stages: int) -> list[range]:
    """Neighbours in `stages` groups, each with a cost above 0, so that the largest sum of a group is least.

    The first of several such cuts. There must be `stages` costs above 0 or more.
    """
    sums = [0, *accumulate(costs)]
    # best[count][end]: the least largest sum of the first `end` members in `count` groups, and where the last group begins.
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for _ in range(stages):
        best.append(
            {
                end: min((max(before, sums[end] - sums[begin]), begin) for begin, before in found)
                for end in range(1, len(costs) + 1)
                if (
                    found := [
                        (begin, cost)
                        for begin, (cost, _) in best[-1].items()
                        if begin < end and sums[begin] < sums[end]
                    ]
                )
            }
        )
    groups, end = [], len(costs)
    for count in range(stages, 0, -1):
        begin = best[count][end][1]
        groups.append(range(begin, end))
        end = begin
    return groups[::-1]


def keep(model: nn.Module, stages: Sequence[nn.Module]) -> None:
    """Drops the tensors of the model that are in none of these stages, and with them their memory. Those that stay keep their names."""
    kept = {id(tensor) for stage in stages for tensor in (*stage.parameters(), *stage.buffers())}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in kept:
                    tensors[name] = None


def micro_batches(samples: int, size: int) -> list[slice]:
    """The samples in pieces of `size`, the last one smaller. A single sample, with which BatchNorm cannot train, joins the one before."""
    starts = list(range(0, samples, size))
    if len(starts) > 1 and size > 1 and samples - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in pairwise([*starts, samples])]


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
    ) -> None:
        """modules: the stages of this process, by number. microbatch: samples of one."""
        self.modules = tuple(modules.values())
        self._group = group
        self._cut = cut
        self._count = count = stages(cut)
        self._size = microbatch
        self._device = device
        self._part = _Part(chance, loss)
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
        """Before the batch of a part."""
        current = self._part
        current.number, current.batch_samples = part.index, part.batch_samples
        current.pieces = micro_batches(part.samples, self._size)

    def learned_nothing(self) -> None:
        """See LossOf."""
        self._part.objective.learned_nothing()

    def __call__(self, batch: Any, samples: int) -> tuple[torch.Tensor, float | None]:
        """Adds to the gradients those of the part's sum of losses / the samples of the whole batch: a loss counts as many times as its
        micro-batch has samples, or as its own weight says. Returns the part's mean loss; and its weight, None where there is none.

        Raises UserError, what the user's code raises, and BrokenGroup.
        """
        current = self._part
        current.batches = [_cut(batch, samples, piece) for piece in current.pieces]
        current.losses = {}
        for shape, numbers in groupby(range(len(current.batches)), key=lambda number: _shape(current.batches[number])):
            self._run(shape, list(numbers))
        return self._sum(current.losses.values())

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
        stages: list[Any] = [
            PipelineStage(stage, number, self._count, self._device, group=self._group)
            for number, stage in self._stages.items()
        ]
        options: dict[str, Any] = {"loss_fn": lambda loss, _: loss, "scale_grads": False}
        match self._cut.schedule if self._cut.takes(microbatches) else None:
            case Schedule.ONE_FORWARD_ONE_BACKWARD:
                return Schedule1F1B(stages[0], microbatches, **options)
            case Schedule.INTERLEAVED:
                return ScheduleInterleaved1F1B(stages, microbatches, **options)
            case Schedule.ZERO_BUBBLE:
                return ScheduleInterleavedZeroBubble(stages, microbatches, **options)
        if len(stages) > 1:
            return ScheduleLoopedBFS(stages, microbatches, **options)
        return ScheduleGPipe(stages[0], microbatches, **options)

    def _sum(self, losses: Iterable[tuple[torch.Tensor, int, float | None]]) -> tuple[torch.Tensor, float | None]:
        """The mean and the weight of all micro-batches, in every process: the last stage has computed them."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for loss, samples, weight in losses:
            counted = samples if weight is None else weight
            if counted:
                sums += torch.stack(
                    (loss.double() * counted, loss.new_tensor(counted).double(), loss.new_tensor(weight is not None))
                )
        dist.all_reduce(sums, group=self._group)
        _, total, own = sums.tolist()
        return sums[0] / (total or 1.0), total if own else None


class _Part:
    """The part that is computed.

    pieces, batches: of its micro-batches. losses: (mean, samples, weight) of each, where the last stage is.
    """

    def __init__(self, chance: Chance, loss: Loss) -> None:
        self.chance = chance
        self.stand_in = _StandIn(chance)
        self.objective = Objective(self.stand_in, loss)
        self.loss = loss
        self.number = 0
        self.batch_samples = 1
        self.batches: list[Any] = []
        self.pieces: list[slice] = []
        self.losses: dict[int, tuple[torch.Tensor, int, float | None]] = {}


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
    """A stage as torch's schedules call it: with the number of the micro-batch, and what the stage before gave."""

    def __init__(self, module: nn.Module, part: _Part, *, number: int, is_last: bool, asks_gradient: bool) -> None:
        """asks_gradient: also where nothing in front of the next stage is trained. The zero bubble's schedule of torch 2.15 computes the
        gradient of a stage's parameters only if its input has one, too."""
        super().__init__()
        self.module = module
        self._part = part
        self._number = number
        self._is_last = is_last
        self._asks_gradient = asks_gradient

    def forward(self, *received: torch.Tensor, microbatch: int) -> Any:
        part = self._part
        part.chance.begin(part.number, microbatch)
        if self._number:
            output = self.module(*received)
        else:
            arguments, keywords = self._call(part.batches[microbatch])
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
        part.chance.begin(part.number, microbatch)
        part.stand_in.outputs = [output]
        piece = part.pieces[microbatch]
        samples: int = piece.stop - piece.start
        loss, weight = part.objective(part.batches[microbatch], samples)
        part.losses[microbatch] = loss.detach(), samples, weight
        if weight == 0:
            # Of no elements: its gradient is zero, whatever the loss is.
            tensors = [*(one for one in received if one.requires_grad), *self.module.parameters()]
            return next(tensor.flatten()[:0].sum() for tensor in tensors if tensor.requires_grad)
        return loss * ((samples if weight is None else weight) / part.batch_samples)


def _pieces(model: nn.Module) -> tuple[list[nn.Module], str]:
    """What the model runs one after the other, and what that is called. Raises WrongInput."""
    own = getattr(model, "pipeline_stages", None)
    if callable(own):
        found = own()
        if not isinstance(found, list | tuple | nn.ModuleList) or not all(isinstance(one, nn.Module) for one in found):
            raise WrongInput(
                f"trainer.model: pipeline_stages() returned a {type(found).__name__}; expected a list of modules in forward()'s order"
            )
        return list(found), "what pipeline_stages() of trainer.model returns"
    if not _is_sequential(model):
        raise WrongInput(
            f"trainer.model: a {type(model).__name__} cannot be cut into the stages of a pipeline: only nn.Sequential is by itself; give "
            "it a method pipeline_stages() that returns its modules in the order of forward(), or set trainer.pipelineSplit"
        )
    return _members(model), "the nn.Sequential of trainer.model"


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _members(module: nn.Module) -> list[nn.Module]:
    """Of an nn.Sequential, and of those that are in it."""
    return [one for member in module.children() for one in (_members(member) if _is_sequential(member) else [member])]


def _check(model: nn.Module, stages: Sequence[nn.Module]) -> None:
    """Raises WrongInput unless the stages are trainable, and share the model's state among them."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    saved = model.state_dict(keep_vars=True).keys()
    names: dict[int, str] = {}
    for name, tensor in tensors:
        if name in saved:
            names.setdefault(id(tensor), name)
    where: dict[int, int] = {}
    for number, stage in enumerate(stages):
        own: set[int] = {id(parameter) for parameter in stage.parameters()}
        if not own:
            raise WrongInput(
                f"trainer.pipelineSplit: stage {number} of {len(stages)} has no parameters: give each stage some, or lower "
                "strategy.modelParallel.pipeline"
            )
        if foreign := own - names.keys():
            name = next(name for name, parameter in stage.named_parameters() if id(parameter) in foreign)
            raise WrongInput(
                f"trainer.pipelineSplit: parameter {name} of stage {number} is not one of the model's: make the stages of the model's own "
                "modules, without copies"
            )
        for key in own | {id(buffer) for buffer in stage.buffers() if id(buffer) in names}:
            if where.setdefault(key, number) != number:
                raise WrongInput(
                    f"trainer.model: {names[key]} is in stage {where[key]} and in stage {number} of the pipeline: tied weights must be in "
                    "one stage; untie them, or cut the model elsewhere in trainer.pipelineSplit"
                )
    for key, name in names.items():
        if key not in where:
            raise WrongInput(
                f"trainer.model: {name} is in no stage of the pipeline: return the modules of all of forward() in "
                "trainer.pipelineSplit or pipeline_stages()"
            )


def _cut(value: Any, samples: int, piece: slice) -> Any:
    """A piece of a batch: of each tensor and array whose first dimension is the samples, and of lists of one value a sample.

    Raises UserError for what it does not know.
    """
    match value:
        case torch.Tensor() | np.ndarray():
            return value[piece] if value.ndim and value.shape[0] == samples else value
        case dict():
            return {name: _cut(one, samples, piece) for name, one in value.items()}
        case list() | tuple():
            if len(value) == samples and not any(
                isinstance(one, torch.Tensor | np.ndarray | list | tuple | dict) for one in value
            ):
                return value[piece]
            cut = [_cut(one, samples, piece) for one in value]
            return cut if isinstance(value, list) else type(value)(*cut) if hasattr(value, "_fields") else tuple(cut)
        case None | bool() | int() | float() | str() | bytes():
            return value
    raise UserError(
        f"trainer.collate: a batch with a {type(value).__name__} cannot be cut into the micro-batches of a pipeline: use tensors, lists, "
        "tuples and dicts"
    )


def _shape(value: Any) -> Any:
    """What the shapes of a micro-batch's tensors are, to be compared."""
    match value:
        case torch.Tensor() | np.ndarray():
            return (tuple(value.shape), str(value.dtype))
        case dict():
            return tuple((name, _shape(one)) for name, one in value.items())
        case list() | tuple():
            return tuple(_shape(one) for one in value)
    return None
