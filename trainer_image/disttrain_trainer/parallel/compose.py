"""How a model is divided over the mesh: one function for each axis, applied in this order.

1. pipeline: this rank's stages of the model
2. tensor: the layers cut over the ranks of a tensor group; then the other stages' are dropped
3. data: what is left is cut, or copied, over the data-parallel ranks

Each takes a LocalModel and returns one; an axis of size 1 leaves it as it is.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """What a rank has of the model. Parameters and buffers have the names of the whole model."""

    module: nn.Module
    pipeline: Pipeline | None = None
    """Runs forward and backward of the stages that lie here; None: the module is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelContext:
    """The job, and this rank's coordinate and groups in its mesh."""

    config: JobConfig
    mesh: Mesh
    at: Coordinate
    groups: Groups | None
    """None for a rank that is alone."""
    loss: Loss
    device: torch.device


Transform = Callable[[LocalModel, ParallelContext], LocalModel]


def cut_pipeline(local: LocalModel, context: ParallelContext) -> LocalModel:
    """This rank's stages."""
    cut = context.config.strategy.model_parallel
    if cut is None or cut.pipeline == 1 or context.groups is None:
        return local
    trainer, parts = context.config.trainer, context.config.parts_per_step
    size, rest = divmod(trainer.batch_size, parts * cut.microbatches)
    if rest or not size:
        raise WrongInput(
            f"trainer.batchSize: {trainer.batch_size} samples are no multiple of {parts} parts a step x {cut.microbatches} micro-batches "
            f"= {parts * cut.microbatches}; change batchSize, or strategy.modelParallel.microbatches"
        )
    model, options = local.module, dict(trainer.config or {})
    chance = Chance(
        model, seed=trainer.seed, device=context.device
    )  # first, as it goes by the names in the whole model
    name = trainer.loop.pipeline_split
    field = "trainer.pipelineSplit"
    with guarded(field if name else "trainer.model"):
        by_user = resolve(field, name, "model", "stages", "config") if name else None
        found = pipeline.split(model, pipeline.stages(cut), config=options, by_user=by_user)
    own = {number: found[number] for number in pipeline.stages_of(cut, context.at.pipeline)}
    return replace(
        local,
        pipeline=Pipeline(
            own,
            cut=cut,
            group=context.groups.mesh.get_group("pipeline"),
            microbatch=size,
            loss=context.loss,
            chance=chance,
            device=context.device,
        ),
    )


def cut_tensor(local: LocalModel, context: ParallelContext) -> LocalModel:
    """The layers cut as trainer.parallelize says, or what is certain of them."""
    if context.groups is None:
        return local
    trainer = context.config.trainer
    options = dict(trainer.config or {})
    if name := trainer.loop.parallelize:
        field = "trainer.parallelize"
        with guarded(field):
            module = resolve(field, name, "model", "mesh", "config")(local.module, context.groups.mesh, options)
        if not isinstance(module, nn.Module):
            raise WrongInput(f"trainer.parallelize returned a {type(module).__name__}; expected the model")
        return replace(local, module=module)
    if context.mesh.tensor == 1:
        return local
    return replace(local, module=tensor.apply(local.module, context.groups.mesh["tensor"]))


def drop_stages(local: LocalModel, context: ParallelContext) -> LocalModel:
    """Without the tensors of the other stages. Not sooner: trainer.parallelize may cut the layers of all of them."""
    if local.pipeline is not None:
        pipeline.keep(local.module, local.pipeline.modules)
    return local


def cut_data(local: LocalModel, context: ParallelContext) -> LocalModel:
    """FSDP2 over the data axes, unless the strategy keeps copies: then the exchange sums their gradients."""
    if context.groups is None or context.config.strategy.sharding is Sharding.REPLICATED:
        return local
    return replace(local, module=fully_shard.shard(local.module, context.groups.mesh))


TRANSFORMS: tuple[Transform, ...] = (cut_pipeline, cut_tensor, drop_stages, cut_data)


def compose(model: nn.Module, context: ParallelContext) -> LocalModel:
    """This rank's part of the model, which it takes over. Raises WrongInput for a model that an axis cannot divide."""
    local = LocalModel(module=model)
    for transform in TRANSFORMS:
        local = transform(local, context)
    return local
