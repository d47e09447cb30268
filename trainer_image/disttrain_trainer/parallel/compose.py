"""How a model is divided over the mesh: one function for each axis, applied in this order.

1. pipeline: this rank's stage of the model
2. tensor: the layers of the stage cut over the ranks of a tensor group
3. activation checkpointing, compile
4. data: what is left is cut, or copied, over the data-parallel ranks

Each takes a Part and returns one; an axis of size 1 leaves it as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from disttrain.api.mesh import Coordinate, Mesh
from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import Sharding
from disttrain_trainer.parallel import fully_shard
from disttrain_trainer.parallel.mesh import Groups


def _same(name: str) -> str:
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a rank has of the model."""

    module: nn.Module
    name_of: Callable[[str], str] = _same
    """The name in the whole model of a parameter or buffer of `module`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the part is, and what for."""

    config: JobConfig
    mesh: Mesh
    at: Coordinate
    groups: Groups | None
    """None for a rank that is alone."""


Step = Callable[[Part, Place], Part]


def cut_data(part: Part, place: Place) -> Part:
    """FSDP2 over the data axes, unless the strategy keeps copies: then the exchange sums their gradients."""
    if place.groups is None or place.config.strategy.sharding is Sharding.REPLICATED:
        return part
    return replace(part, module=fully_shard.shard(part.module, place.groups.mesh))


STEPS: tuple[Step, ...] = (cut_data,)


def compose(model: nn.Module, place: Place) -> Part:
    """This rank's part of the model, which it takes over. Raises WrongInput for a model that an axis cannot divide."""
    part = Part(module=model)
    for step in STEPS:
        part = step(part, place)
    return part
