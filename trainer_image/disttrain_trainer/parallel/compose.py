"""How a model is divided over the mesh: one function for each axis, applied in this order.

1. pipeline: this rank's stages of the model
2. tensor: the layers cut over the ranks of a tensor group; then the other stages' are dropped
3. data: what is left is cut, or copied, over the data-parallel ranks

Each takes a Part and returns one; an axis of size 1 leaves it as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from disttrain.api.mesh import Coordinate, Mesh
from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import Sharding
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.factories import resolve
from disttrain_trainer.model.task import Loss
from disttrain_trainer.model.user_code import guarded
from disttrain_trainer.parallel import fully_shard, pipeline, tensor
from disttrain_trainer.parallel.chance import Chance
from disttrain_trainer.parallel.mesh import Groups
from disttrain_trainer.parallel.pipeline import Pipeline


def _same(name: str) -> str:
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a rank has of the model."""

    module: nn.Module
    name_of: Callable[[str], str] = _same
    """The name in the whole model of a parameter or buffer of `module`."""
    pipeline: Pipeline | None = None
    """Runs forward and backward of the stages that lie here; None: the module is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the part is, and what for."""

    config: JobConfig
    mesh: Mesh
    at: Coordinate
    groups: Groups | None
    """None for a rank that is alone."""
    loss: Loss
    device: torch.device


Step = Callable[[Part, Place], Part]


def cut_pipeline(part: Part, place: Place) -> Part:
    """This rank's stages."""
    cut = place.config.strategy.model_parallel
    if cut is None or cut.pipeline == 1 or place.groups is None:
        return part
    trainer, parts = place.config.trainer, place.config.parts_per_step
    size, rest = divmod(trainer.batch_size, parts * cut.microbatches)
    if rest or not size:
        raise WrongInput(
            f"trainer.batchSize: {trainer.batch_size} samples are no multiple of {parts} parts a step x {cut.microbatches} micro-batches "
            f"= {parts * cut.microbatches}; change batchSize, or strategy.modelParallel.microbatches"
        )
    model, options = part.module, dict(trainer.config or {})
    chance = Chance(model, seed=trainer.seed, device=place.device)  # first, as it goes by the names in the whole model
    name = trainer.loop.pipeline_split
    field = "trainer.pipelineSplit"
    with guarded(field if name else "trainer.model"):
        by_user = resolve(field, name, "model", "stages", "config") if name else None
        found = pipeline.split(model, pipeline.stages(cut), config=options, by_user=by_user)
    own = {number: found[number] for number in pipeline.stages_of(cut, place.at.pipeline)}
    return replace(
        part,
        pipeline=Pipeline(
            own,
            cut=cut,
            group=place.groups.mesh.get_group("pipeline"),
            microbatch=size,
            loss=place.loss,
            chance=chance,
            device=place.device,
        ),
    )


def cut_tensor(part: Part, place: Place) -> Part:
    """The layers cut as trainer.parallelize says, or what is certain of them."""
    if place.groups is None:
        return part
    trainer = place.config.trainer
    options = dict(trainer.config or {})
    if name := trainer.loop.parallelize:
        field = "trainer.parallelize"
        with guarded(field):
            module = resolve(field, name, "model", "mesh", "config")(part.module, place.groups.mesh, options)
        if not isinstance(module, nn.Module):
            raise WrongInput(f"trainer.parallelize returned a {type(module).__name__}; expected the model")
        return replace(part, module=module)
    if place.mesh.tensor == 1:
        return part
    return replace(part, module=tensor.apply(part.module, place.groups.mesh["tensor"]))


def drop_stages(part: Part, place: Place) -> Part:
    """Without the tensors of the other stages. Not sooner: trainer.parallelize may cut the layers of all of them."""
    if part.pipeline is not None:
        pipeline.keep(part.module, part.pipeline.modules)
    return part


def cut_data(part: Part, place: Place) -> Part:
    """FSDP2 over the data axes, unless the strategy keeps copies: then the exchange sums their gradients."""
    if place.groups is None or place.config.strategy.sharding is Sharding.REPLICATED:
        return part
    return replace(part, module=fully_shard.shard(part.module, place.groups.mesh))


STEPS: tuple[Step, ...] = (cut_pipeline, cut_tensor, drop_stages, cut_data)


def compose(model: nn.Module, place: Place) -> Part:
    """This rank's part of the model, which it takes over. Raises WrongInput for a model that an axis cannot divide."""
    part = Part(module=model)
    for step in STEPS:
        part = step(part, place)
    return part
