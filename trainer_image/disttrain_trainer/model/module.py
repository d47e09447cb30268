"""What the user's factory returned as a model: what cannot be trained is refused by name, and its modes of training are settled."""

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
            if (
                kind == "parameter"
                and tensor.layout is torch.strided
                and (overlaps(tensor) or tensor.is_conj() or tensor.is_neg())
            ):
                # So that a saved value can be put there.
                tensor.data = tensor.data.resolve_conj().resolve_neg().clone()
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
