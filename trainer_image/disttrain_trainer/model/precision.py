"""trainer.precision: what of a step is computed in bfloat16. By torch.autocast, in every strategy alike.

Parameters stay float32, and with them the gradients, the optimiser, and all that is exchanged and saved. FSDP2 has a policy of its own
(MixedPrecisionPolicy), which is not used: it computes all of a module in bfloat16, where autocast leaves norms, softmax and losses in
float32, so that another strategy would train another model.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Final

import torch
from torch import nn
from torch.utils._pytree import tree_map

from disttrain.api.precision import Precision
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

_HALVES = (torch.bfloat16, torch.float16)


class Autocast:
    """The precision of a job, on one device. For the training thread."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.is_on = precision is not Precision.FLOAT32
        self._device = device.type

    @property
    def dtype(self) -> torch.dtype:
        """That of the products: how exact a result is. float32 stands for that of the parameters."""
        return torch.bfloat16 if self.is_on else torch.float32

    def context(self) -> AbstractContextManager[Any]:
        """A new context for one forward.

        Without torch's cache of the parameters that were cast: it keeps one that was cast under no_grad(), as for a teacher's forward,
        and gives it to the forward after it, whose gradient then reaches no parameter. It would also keep what FSDP2 has let go.
        """
        if not self.is_on:
            return nullcontext()
        return torch.autocast(self._device, dtype=torch.bfloat16, cache_enabled=False)

    def loss(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The user's loss in this precision: its mean is float32. The function itself where nothing changes."""
        if not self.is_on:
            return loss

        @wraps(loss)
        def cast(model: nn.Module, batch: Any) -> Any:
            with self.context():
                found = loss(model, batch)
            if isinstance(found, tuple | list) and found:
                return (_whole(found[0]), *found[1:])
            return _whole(found)

        return cast

    @contextmanager
    def evaluating(self, model: nn.Module) -> Any:
        """Around the user's `evaluate`: what the model returns is float32, as numpy() takes no bfloat16."""
        if not self.is_on:
            yield
            return
        handle = model.register_forward_hook(lambda _, __, found: tree_map(_whole, found))
        try:
            with self.context():
                yield
        finally:
            handle.remove()

    def check(self, model: nn.Module) -> None:
        """Says in the log where the precision changes nothing."""
        if self.is_on and all(p.dtype is torch.float64 for p in model.parameters() if p.is_floating_point()):
            log.warning(
                "trainer.precision: BFloat16 changes nothing: all parameters of trainer.model are float64, which torch.autocast leaves as "
                "they are"
            )


UNCHANGED: Final = Autocast(Precision.FLOAT32, torch.device("cpu"))
"""Of a forward in the numbers of the parameters, on any device."""


def _whole(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALVES else value
