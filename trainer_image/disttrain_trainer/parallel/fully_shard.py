"""FSDP2: parameters, gradients and the optimiser's state cut over the ranks of the axis `shard`, copies of them along `replicate`.

Each wrapped module is gathered before its forward and its backward, and let go after it. In a pipeline, where forward and backward of many
micro-batches take turns, it is gathered once a step (`gather`), and its gradients are summed once a step (`reduce`). The sums of
gradients are plain sums: the loss of a part is weighted before backward, as with any other exchange.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.blocks import blocks_of
from disttrain_trainer.parallel import shard_collectives


def shard(model: nn.Module, mesh: DeviceMesh, *, stages: Sequence[nn.Module] = ()) -> nn.Module:
    """Wraps the model in place, block by block. mesh: of the axes replicate and shard; a replicate of size 1 costs nothing.

    Where trainer.parallelize has wrapped some modules already, it has chosen the blocks: only what is left is wrapped, with the model.

    stages: the modules of a pipeline that lie here, each of which is called by itself, in place of the model. Then `gather` and `reduce`
    must be called in each step, in all ranks of the mesh.
    What it leaves whole, scalars and parameters without elements, has its gradients summed by the exchange. Raises WrongInput for a model
    that FSDP2 cannot cut.
    """
    data = mesh["shard"] if mesh["replicate"].size() == 1 else mesh["replicate", "shard"]
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()  # FSDP2 cuts no other memory format
    whole = {parameter for parameter in model.parameters() if not (parameter.dim() and parameter.numel())}
    roots = stages or (model,)
    try:
        chosen = any(isinstance(module, FSDPModule) for module in model.modules())
        called = {id(module) for root in roots for module in root.modules()}
        for block in [] if chosen else blocks_of(model):
            if id(block) in called:
                fully_shard(block, mesh=data, ignored_params=whole)
        for root in roots:
            if not isinstance(root, FSDPModule):
                fully_shard(root, mesh=data, ignored_params=whole)  # in place
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise WrongInput(
            f"trainer.model cannot be cut by FSDP2: {str(error).splitlines()[0]}; change the model, or wrap the modules that can be cut by "
            "fully_shard in trainer.parallelize, or set strategy.dataParallel.sharding to Replicated"
        ) from None
    for module in _wrapped(roots):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        # A parameter that takes no part on one rank may do so on another: the sums must be the same everywhere.
        module.set_reduce_scatter_unused_params(True)
        if mesh.device_type == "cpu":
            shard_collectives.use(module)
    for stage in stages:
        assert isinstance(stage, FSDPModule)
        stage.set_reshard_after_forward(False)
        stage.set_manual_backward_finalization(True)
        # Here and not in the first forward: a rank that has no part gathers and reduces all the same.
        stage._get_fsdp_state()._lazy_init()
        _keep(stage)
    return model


def gather(stages: Iterable[nn.Module]) -> None:
    """Before the first part of a step: makes the parameters of these stages whole. Stages that are not wrapped stay as they are."""
    for module in _wrapped(stages):
        module.unshard()


def reduce(stages: Iterable[nn.Module]) -> None:
    """After the last part of a step: sums the gradients over the ranks, and lets go of the parameters and of the other ranks' gradients.

    The order of the sums is that of the modules, the last first, in each rank: also in one that had no part.
    """
    for stage in stages:
        if isinstance(stage, FSDPModule):
            for module in _wrapped((stage,)):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    group._post_backward_pending = True  # torch: only what this rank has computed a gradient of
            stage.set_requires_gradient_sync(True)
            stage.set_reshard_after_backward(True)
            stage.finalize_backward()
            _keep(stage)


def _keep(stage: FSDPModule) -> None:
    stage.set_requires_gradient_sync(False)
    stage.set_reshard_after_backward(False)


def gathered(roots: Iterable[nn.Module]) -> Iterator[FSDPParam]:
    """FSDP2's own records of what it has cut. torch has no public way to a gathered parameter, whose gradient tells who took part."""
    for module in _wrapped(roots):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            yield from group.fsdp_params


def _wrapped(roots: Iterable[nn.Module]) -> Iterator[FSDPModule]:
    for root in roots:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                yield module
