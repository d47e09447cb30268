"""The blocks of a model: what FSDP2 gathers, activation checkpointing computes again and torch.compile compiles by itself."""

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of the largest ModuleList or Sequential, by elements of their parameters.

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
