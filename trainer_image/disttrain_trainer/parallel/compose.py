"""How a model is divided over the mesh: one function for each axis, applied in this order.

1. pipeline: this rank's stages of the model
2. tensor: the layers cut over the ranks of a tensor group; then the other stages' are dropped
3. data: what is left is cut, or copied, over the data-parallel ranks
4. what is left is taken into memory, where the whole model lay in files
5. activation checkpointing, then compile: of forward() of the blocks, within what FSDP2 does before and after it

Where layers are cut, a small batch is computed by the whole model before and by the cut one after (trial.py); nothing is compiled for it.

Each takes a LocalModel and returns one; an axis of size 1 leaves it as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from disttrain.api.mesh import Coordinate, Mesh
from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import Sharding
from disttrain_trainer.data.chance import mix
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model import forward_options
from disttrain_trainer.model.factories import resolve
from disttrain_trainer.model.objective import Loss
from disttrain_trainer.model.precision import UNCHANGED, Autocast
from disttrain_trainer.model.user_code import guarded
from disttrain_trainer.parallel import fully_shard, stages, tensor, user_plan
from disttrain_trainer.parallel.chance import Chance
from disttrain_trainer.parallel.mesh import Groups
from disttrain_trainer.parallel.pipeline import Pipeline
from disttrain_trainer.parallel.trial import Outputs, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """What a rank has of the model. Parameters and buffers have the names of the whole model."""

    module: nn.Module
    pipeline: Pipeline | None = None
    """Runs forward and backward of the stages that lie here; None: the module is called."""
    chance: Chance | None = None
    """Of a pipeline."""
    whole: Outputs | None = None
    """What the modules of the whole model returned; None where the cut model is not compared with it."""


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
    autocast: Autocast = UNCHANGED
    sample: Callable[[], Any] | None = None
    """Returns the same small batch each time, which the cut model and the whole one both compute; None: they are not compared. The same
    on all ranks."""

    @property
    def plan_field(self) -> str:
        """The field that decides how layers are cut."""
        own = self.config.trainer.loop.parallelize
        return user_plan.FIELD if own else "strategy.modelParallel.tensor"


Transform = Callable[[LocalModel, ParallelContext], LocalModel]


def make_dense(local: LocalModel, context: ParallelContext) -> LocalModel:
    """Embeddings give dense gradients: those of a cut model are summed over ranks as such. The numbers are the same."""
    for module in local.module.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
    return local


def cut_pipeline(local: LocalModel, context: ParallelContext) -> LocalModel:
    """This rank's stages."""
    cut = context.config.strategy.model_parallel
    if cut is None or cut.pipeline == 1 or context.groups is None:
        return local
    trainer, parts = context.config.trainer, context.config.parts_per_step
    portions = trainer.gradient_accumulation_steps
    size, rest = divmod(trainer.batch_size, parts * portions * cut.microbatches)
    if rest or not size:
        by = f" x {portions} portions (gradientAccumulationSteps)" if portions > 1 else ""
        raise WrongInput(
            f"trainer.batchSize: {trainer.batch_size} samples are no multiple of {parts} parts a step{by} x {cut.microbatches} "
            f"micro-batches = {parts * portions * cut.microbatches}; change batchSize, or strategy.modelParallel.microbatches"
        )
    model, options = local.module, dict(trainer.config or {})
    chance = Chance(
        model, seed=trainer.seed, device=context.device
    )  # first, as it goes by the names in the whole model
    name = trainer.loop.pipeline_split
    field = "trainer.pipelineSplit"
    with guarded(field if name else "trainer.model"):
        by_user = resolve(field, name, "model", "stages", "config") if name else None
        found = stages.split(model, stages.count(cut), config=options, by_user=by_user)
    own = {number: found[number] for number in stages.of(cut, context.at.pipeline)}
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
            autocast=context.autocast,
        ),
        chance=chance,
    )


def try_whole(local: LocalModel, context: ParallelContext) -> LocalModel:
    """What the whole model computes of a small batch, where its layers will be cut."""
    trial = _trial(local, context)
    if trial is None or not (context.mesh.tensor > 1 or context.config.trainer.loop.parallelize):
        return local
    return replace(local, whole=trial.run(local.module))


def cut_tensor(local: LocalModel, context: ParallelContext) -> LocalModel:
    """The layers cut as trainer.parallelize says, or what is certain of them."""
    if context.groups is None:
        return local
    trainer = context.config.trainer
    if name := trainer.loop.parallelize:
        module = user_plan.apply(
            name,
            local.module,
            context.groups.mesh,
            dict(trainer.config or {}),
            cuts_data=context.config.strategy.sharding is not Sharding.REPLICATED,
        )
        return replace(local, module=module)
    if context.mesh.tensor == 1:
        return local
    return replace(local, module=tensor.apply(local.module, context.groups.mesh["tensor"]))


def try_stages(local: LocalModel, context: ParallelContext) -> LocalModel:
    """In a pipeline, before the other stages are dropped: the cut model computes the same.

    Not where trainer.parallelize calls fully_shard: FSDP2 lets no stage be wrapped after a module in it was called.
    """
    if local.pipeline is None or any(isinstance(module, FSDPModule) for module in local.module.modules()):
        return local
    return _compared(local, context)


def drop_stages(local: LocalModel, context: ParallelContext) -> LocalModel:
    """Without the tensors of the other stages. Not sooner: trainer.parallelize may cut the layers of all of them."""
    if local.pipeline is not None:
        stages.keep(local.module, local.pipeline.modules)
    return local


def cut_data(local: LocalModel, context: ParallelContext) -> LocalModel:
    """FSDP2 over the data axes, unless the strategy keeps copies: then the exchange sums their gradients."""
    if context.groups is None or context.config.strategy.sharding is Sharding.REPLICATED:
        return local
    own = local.pipeline.modules if local.pipeline is not None else ()
    return replace(local, module=fully_shard.shard(local.module, context.groups.mesh, stages=own))


def take_into_memory(local: LocalModel, context: ParallelContext) -> LocalModel:
    """What lies here, out of the files that the whole model lay in (model/mapped.py): in place, tensors stay the same objects."""
    with torch.no_grad():
        for tensor in (*local.module.parameters(), *local.module.buffers()):
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if type(own) in (torch.Tensor, nn.Parameter) and own.untyped_storage().filename is not None:
                own.data = own.data.clone()
    return local


def try_cut(local: LocalModel, context: ParallelContext) -> LocalModel:
    """Without a pipeline: the cut model computes the same."""
    return _compared(local, context) if local.pipeline is None else local


def _compared(local: LocalModel, context: ParallelContext) -> LocalModel:
    if (trial := _trial(local, context)) is not None:
        trial.compare(local.whole, local.module, field=context.plan_field)
    return replace(local, whole=None)


def _trial(local: LocalModel, context: ParallelContext) -> Trial | None:
    if context.sample is None or context.groups is None:
        return None
    seed = mix(context.config.trainer.seed, 0)  # that of the first part
    return Trial(loss=context.loss, batch=context.sample, seed=seed, device=context.device, chance=local.chance)


def change_forward(local: LocalModel, context: ParallelContext) -> LocalModel:
    """Activation checkpointing and compile of what lies here."""
    run = local.pipeline
    forward_options.apply(
        local.module,
        context.config.trainer,
        called=run.modules if run is not None else (),
        replay=local.chance.replay if local.chance is not None else None,
    )
    return local


TRANSFORMS: tuple[Transform, ...] = (
    make_dense,
    cut_pipeline,
    try_whole,
    cut_tensor,
    try_stages,
    drop_stages,
    cut_data,
    take_into_memory,
    try_cut,
    change_forward,
)


def compose(model: nn.Module, context: ParallelContext) -> LocalModel:
    """This rank's part of the model, which it takes over. Raises WrongInput for a model that an axis cannot divide."""
    local = LocalModel(module=model)
    for transform in TRANSFORMS:
        local = transform(local, context)
    return local
