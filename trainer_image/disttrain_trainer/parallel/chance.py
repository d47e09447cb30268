"""Chance that does not depend on who computes what: dropout is a function of (seed, part, micro-batch, module).

One generator serves a whole process, so what a module draws depends on what was drawn before it. In a pipeline that is another
sequence in each process. So the generator is set again before each module that may draw, by the module's name. A step and its part are one
number: that of the part in the whole training.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from disttrain_trainer.data.chance import mix

_DRAWING = (
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.MultiheadAttention,
    nn.RNNBase,
)
"""The modules of torch that draw in forward()."""


class Chance:
    """Keys what the modules of a model draw. For one thread."""

    def __init__(self, model: nn.Module, *, seed: int, device: torch.device) -> None:
        """model: whole, as the factory made it: the names of its modules are those of one process. It gets hooks, for as long as it lives.

        A module of torch that never draws gets none; one of the user's may draw in its own forward().
        """
        self._seed = seed
        self._cuda = device.type == "cuda"
        self._key = 0
        self._calls: dict[int, int] = {}
        """How often a module was called since `begin`, by the number of its name."""
        for name, module in model.named_modules():
            if name and (isinstance(module, _DRAWING) or not type(module).__module__.startswith("torch.nn.")):
                module.register_forward_pre_hook(self._hook(_number(name)))
        model.register_forward_hook(lambda *_: self.after_model())

    def begin(self, part: int, microbatch: int) -> None:
        """Before the forward of a micro-batch, or of one stage of it, and before the loss draws what it needs for the model.

        part: its number in the whole training. microbatch: its number in the part.
        """
        self._key = mix(mix(self._seed, part), microbatch)
        self._calls.clear()
        self._set(self._key)

    def after_model(self) -> None:
        """Where the model's forward ends: what the loss draws then does not depend on what the model drew."""
        self._set(mix(self._key, 1))

    def replay(self) -> Callable[[], AbstractContextManager[None]]:
        """Remembers where in a micro-batch this is: see activations.Replay. Backward comes back to it while another one is computed."""
        key, calls = self._key, dict(self._calls)

        @contextmanager
        def again() -> Iterator[None]:
            before = self._key, self._calls
            self._key, self._calls = key, dict(calls)
            try:
                yield
            finally:
                self._key, self._calls = before

        return again

    def _hook(self, number: int) -> Any:
        def draw(*_: Any) -> None:
            call = self._calls.get(number, 0)
            self._calls[number] = call + 1
            self._set(mix(mix(self._key, number), call))

        return draw

    def _set(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self._cuda:
            torch.cuda.manual_seed(seed)


def _number(name: str) -> int:
    """A number of 63 bits for a module's name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
