"""The user's `trainer.parallelize`: what it may do to the model, and one line that names the mistake where it does something else.

It may cut parameters over the axis `tensor` of the mesh that it gets, and wrap modules by fully_shard over the data axes where the strategy
cuts the model over them. Names, shapes, dtypes, tied weights and what is trained stay those of the model that it was given: state and
checkpoints go by them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate

from disttrain.api.mesh import AXES
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.factories import resolve
from disttrain_trainer.model.user_code import guarded

FIELD: Final = "trainer.parallelize"


@dataclass(frozen=True, slots=True)
class _Parameter:
    """What must not change of a parameter."""

    shape: torch.Size
    dtype: torch.dtype
    is_trained: bool


def apply(name: str, model: nn.Module, mesh: DeviceMesh, options: dict[str, Any], *, cuts_data: bool) -> nn.Module:
    """The model as the user's function returns it. name: the value of the field. mesh: of all axes.

    cuts_data: the strategy cuts the model over the data axes, so that fully_shard may be called. Raises WrongInput, and what the function
    raises.
    """
    tied = _tied(model)
    before = {key: _form(parameter) for key, parameter in model.named_parameters(remove_duplicate=False)}
    with guarded(FIELD):
        try:
            module = resolve(FIELD, name, "model", "mesh", "config")(model, mesh, options)
        except KeyError as error:
            if "mesh_dim_name" not in str(error):
                raise
            raise WrongInput(
                f"{FIELD} asks the mesh for an axis that it does not have ({error.args[0]}): its axes are {', '.join(AXES)}"
            ) from None
    if not isinstance(module, nn.Module):
        raise WrongInput(f"{FIELD} returned a {type(module).__name__}; expected the model")
    _check_names(before, module)
    _check_tied(tied, _tied(module))
    for key, parameter in module.named_parameters():
        _check_form(key, before[key], _form(parameter))
    _check_wraps(module, mesh, cuts_data=cuts_data)
    _check_placements(module, mesh)
    return module


def _check_names(before: dict[str, _Parameter], module: nn.Module) -> None:
    found = {key for key, _ in module.named_parameters(remove_duplicate=False)}
    lost, new = sorted(before.keys() - found), sorted(found - before.keys())
    if lost and new:
        raise WrongInput(
            f"{FIELD} renames parameters ({lost[0]} is {new[0]} now): checkpoints go by their names; use what wraps a module in place, "
            "such as module.compile() and fully_shard(module), and not torch.compile(module), DistributedDataParallel or checkpoint_wrapper"
        )
    if lost or new:
        change, key = ("removes", lost[0]) if lost else ("adds", new[0])
        raise WrongInput(f"{FIELD} {change} parameter {key}: make the model whole in trainer.model, and cut it here")


def _check_tied(before: list[set[str]], now: list[set[str]]) -> None:
    for names in before:
        if names not in now:
            first, second = sorted(names)[:2]
            raise WrongInput(
                f"{FIELD} makes two parameters of {first} and {second}, which are tied: cut both in the same way and tie them again "
                "(module.weight = other.weight) before it returns, or leave both out of the plan"
            )


def _check_form(key: str, before: _Parameter, now: _Parameter) -> None:
    for what, then, found in (
        ("shape", list(before.shape), list(now.shape)),
        ("dtype", before.dtype, now.dtype),
        ("requires_grad", before.is_trained, now.is_trained),
    ):
        if then != found:
            raise WrongInput(
                f"{FIELD} changes parameter {key}: its {what} was {then} and is {found}: do that in trainer.model, and cut the model here"
            )


def _check_wraps(module: nn.Module, mesh: DeviceMesh, *, cuts_data: bool) -> None:
    axes = ("replicate", "shard") if mesh["replicate"].size() > 1 else ("shard",)
    for key, wrapped in module.named_modules():
        if not isinstance(wrapped, FSDPModule):
            continue
        where = key or "the model"
        if not cuts_data:
            raise WrongInput(
                f"{FIELD} calls fully_shard on {where}, but strategy.dataParallel.sharding is Replicated: set it to FullyShard or "
                "HybridShard, or leave fully_shard out"
            )
        for parameter in module.get_submodule(key).parameters():
            if isinstance(parameter, DTensor) and not {*axes} <= {*(parameter.device_mesh.mesh_dim_names or ())}:
                expected = "mesh[" + ", ".join(f'"{axis}"' for axis in axes) + "]"
                raise WrongInput(
                    f"{FIELD} calls fully_shard on {where} with another mesh than {expected}: pass mesh={expected}, of the mesh that it is "
                    "given"
                )


def _check_placements(module: nn.Module, mesh: DeviceMesh) -> None:
    wrapped = {
        id(parameter)
        for key, one in module.named_modules()
        if isinstance(one, FSDPModule)
        for parameter in module.get_submodule(key).parameters()
    }
    for key, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        names = parameter.device_mesh.mesh_dim_names or ()
        if not _is_part_of(mesh, parameter.device_mesh, names):
            own = f" (axes {', '.join(names)})" if names else ""
            raise WrongInput(
                f"{FIELD} cuts {key} over a mesh of its own{own}: use the mesh that it is given, mesh['tensor'] for the layers"
            )
        for axis, placement in zip(names, parameter.placements, strict=True):
            if isinstance(placement, Partial):
                raise WrongInput(
                    f"{FIELD} leaves parameter {key} as a partial sum over {axis}: give it the placement Replicate or Shard"
                )
            allowed = axis == "tensor" or (axis == "shard" and id(parameter) in wrapped)
            if not isinstance(placement, Replicate) and not allowed:
                raise WrongInput(
                    f"{FIELD} cuts {key} over the axis {axis}: layers are cut over tensor, and fully_shard cuts over the data axes"
                )
    for key, buffer in module.named_buffers():
        if isinstance(buffer, DTensor):
            raise WrongInput(
                f"{FIELD} cuts or distributes the buffer {key}: buffers stay whole tensors; leave its module out of the plan"
            )


def _is_part_of(mesh: DeviceMesh, part: DeviceMesh, names: tuple[str, ...]) -> bool:
    if not names or not {*names} <= {*AXES}:
        return False
    own = mesh[names[0]] if len(names) == 1 else mesh[names]
    return torch.equal(own.mesh, part.mesh)


def _form(parameter: nn.Parameter) -> _Parameter:
    return _Parameter(parameter.shape, parameter.dtype, parameter.requires_grad)


def _tied(model: nn.Module) -> list[set[str]]:
    """The names of each parameter that has several."""
    return [names for names in _names(model) if len(names) > 1]


def _names(model: nn.Module) -> Iterator[set[str]]:
    found: dict[int, set[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), set()).add(key)
    yield from found.values()
