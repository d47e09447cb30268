"""FSDP2: parameters, gradients and the optimiser's state cut over the ranks of the axis `shard`, copies of them along `replicate`.

Each wrapped module is gathered before its forward and its backward, and let go after it. The sums of gradients are plain sums: the loss
of a part is weighted before backward, as with any other exchange.
"""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.parallel import shard_collectives


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Wraps the model in place, block by block. mesh: of the axes replicate and shard; a replicate of size 1 costs nothing.

    Where trainer.parallelize has wrapped some modules already, it has chosen the blocks: only what is left is wrapped, with the model.

    What it leaves whole, scalars and parameters without elements, has its gradients summed by the exchange. Raises WrongInput for a model
    that FSDP2 cannot cut.
    """
    data = mesh["shard"] if mesh["replicate"].size() == 1 else mesh["replicate", "shard"]
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()  # FSDP2 cuts no other memory format
    whole = {parameter for parameter in model.parameters() if not (parameter.dim() and parameter.numel())}
    try:
        for block in [] if any(isinstance(module, FSDPModule) for module in model.modules()) else blocks_of(model):
            fully_shard(block, mesh=data, ignored_params=whole)
        if not isinstance(model, FSDPModule):
            fully_shard(model, mesh=data, ignored_params=whole)  # in place
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise WrongInput(
            f"trainer.model cannot be cut by FSDP2: {str(error).splitlines()[0]}; change the model, or wrap the modules that can be cut by "
            "fully_shard in trainer.parallelize, or set strategy.dataParallel.sharding to Replicated"
        ) from None
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # A parameter that takes no part on one rank may do so on another: the sums must be the same everywhere.
            module.set_reduce_scatter_unused_params(True)
            if mesh.device_type == "cpu":
                shard_collectives.use(module)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is wrapped by itself: the members of the largest ModuleList or Sequential, by elements of their parameters.

    Not one that shares a parameter with the rest of the model: tied weights must be gathered together. None where the model has no such
    list, or is one itself of a single member.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)]
    largest = max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=None)
    if largest is None:
        return []
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for member in largest:
        inside: dict[int, int] = {}
        for module in member.modules():
            for parameter in module.parameters(recurse=False):
                inside[id(parameter)] = inside.get(id(parameter), 0) + 1
        if inside and all(owners[key] == count for key, count in inside.items()) and member is not model:
            found.append(member)
    return found


def gathered(model: nn.Module) -> Iterator[FSDPParam]:
    """FSDP2's own records of what it has cut. torch has no public way to a gathered parameter, whose gradient tells who took part."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield from group.fsdp_params
