"""The stages of a pipeline: which a model is cut into, and which a process has."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from disttrain.api.strategy import ModelParallel, Schedule
from disttrain_trainer.errors import WrongInput

Split = Callable[[nn.Module, int, dict[str, Any]], Any]
"""The user's trainer.pipelineSplit: (model, stages, config) -> the stages, in the order of forward."""


def of(cut: ModelParallel, rank: int) -> range:
    """The numbers of the stages of one process of a pipeline."""
    return range(rank, count(cut), cut.pipeline)


def count(cut: ModelParallel) -> int:
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
