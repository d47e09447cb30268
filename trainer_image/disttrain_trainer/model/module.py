"""What the user's factory returned as a model: what cannot be trained is refused by name, and its modes of training are set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from disttrain_trainer.checkpoint.tensors import overlaps
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

_NAMED = 3
"""Modules that a line in the log names."""


def prepare(model: nn.Module) -> None:
    """Makes the model ready to be trained. Raises WrongInput, which names what cannot be."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise WrongInput(
                    f"trainer.model: {kind} {name} has no shape yet, as in a Lazy module: call the model once on a sample in the factory"
                )
            if tensor.is_meta:
                raise WrongInput(
                    f"trainer.model: {kind} {name} is on the meta device and has no values: use to_empty() and set them in the factory"
                )
            if tensor.is_inference():
                raise WrongInput(
                    f"trainer.model: {kind} {name} was made under torch.inference_mode(), and cannot be trained with: use torch.no_grad() "
                    "in the factory"
                )
            if kind == "parameter" and tensor.layout is not torch.strided:
                raise WrongInput(
                    f"trainer.model: parameter {name} has the layout {tensor.layout}; our loop trains dense parameters: keep the values in "
                    "one, and build the sparse tensor in forward()"
                )
            if (
                kind == "parameter"
                and tensor.layout is torch.strided
                and (overlaps(tensor) or tensor.is_conj() or tensor.is_neg())
            ):
                # So that a saved value can be put there.
                tensor.data = tensor.data.resolve_conj().resolve_neg().clone()
    _refuse_shared(model)
    modules = dict(model.named_modules())
    if not any(module.training for module in modules.values()):
        # As whatever loads pretrained weights returns it: BatchNorm would not count, dropout not drop.
        log.info("trainer.model returned a model in eval mode: it is trained in training mode")
        model.train()
    elif fixed := [name or "the model itself" for name, module in modules.items() if not module.training]:
        more = f" and {len(fixed) - _NAMED} more" if len(fixed) > _NAMED else ""
        log.info(
            "these modules stay in eval mode, as trainer.model returned them: %s%s", ", ".join(fixed[:_NAMED]), more
        )


def _refuse_shared(model: nn.Module) -> None:
    """Raises WrongInput when a trained parameter shares memory with another tensor of the model: it is moved, and the other would stay
    behind with the first values. One Parameter under several names, as for tied weights, is one tensor."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    tensors = [
        (tensor.untyped_storage().data_ptr(), _extent(tensor), name, tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.layout is torch.strided and tensor.numel()
    ]
    tensors.sort(key=lambda entry: (entry[0], entry[1].start))
    for number, (storage, extent, name, tensor) in enumerate(tensors):
        for other_storage, other_extent, other_name, other in tensors[number + 1 :]:
            if other_storage != storage or other_extent.start >= extent.stop:
                break
            if trained.isdisjoint((id(tensor), id(other))) or not _common(tensor, other):
                continue
            raise WrongInput(
                f"trainer.model: {name} and {other_name} share memory, and are two tensors: to tie weights put one Parameter in both "
                "places (self.b.weight = self.a.weight); otherwise clone() one of them"
            )


def _extent(tensor: torch.Tensor) -> range:
    """The bytes of its storage from its first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset()
    return range(first * tensor.itemsize, (first + last + 1) * tensor.itemsize)


def _common(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one storage whose extents meet have an element in common: columns of a matrix, say, have none."""
    if one.itemsize != other.itemsize:
        return True
    end = max(_extent(one).stop, _extent(other).stop) // one.itemsize
    used = torch.zeros(end, dtype=torch.bool)
    used.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(used.as_strided(other.shape, other.stride(), other.storage_offset()).any())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module is in the mode that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
