"""Activation checkpointing: backward computes the blocks of a model again, so that forward keeps only what goes into each.

By torch.utils.checkpoint (Chen et al., arXiv:1604.06174), without reentrance. The second time a block draws what it drew the first time,
and starts from the buffers that it had then; the model's buffers stay those of the first time.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Replay = Callable[[], Callable[[], AbstractContextManager[None]]]
"""Called before a block's forward: remembers what the block's chance depends on. What it returns makes a context with it, each time that
the block is computed again."""


def _no_replay() -> Callable[[], AbstractContextManager[None]]:
    return nullcontext


def recompute(blocks: Sequence[nn.Module], *, replay: Replay = _no_replay) -> None:
    """Changes forward() of each block in place; names, hooks and type stay.

    replay: of whoever sets torch's generator within a block. The generator itself is put back by torch.
    """
    for block in blocks:
        block.forward = Recomputed(block, replay)


class Recomputed:
    """forward() of one block."""

    def __init__(self, block: nn.Module, replay: Replay) -> None:
        self.inner: Callable[..., Any] = block.forward
        """What is computed, once more in backward."""
        self._block = block
        self._replay = replay

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*arguments, **keywords)
        again = _Again(self._block, self._replay())
        return checkpoint(
            self.inner, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **keywords
        )


class _Again:
    """Around each computation after the first: with the buffers and the chance of the first.

    The block gets other tensors for its buffers meanwhile: what backward has kept of the first ones must not change in place.
    """

    def __init__(self, block: nn.Module, chance: Callable[[], AbstractContextManager[None]]) -> None:
        self._chance = chance
        self._before = [
            (module, name, buffer.clone())
            for module in block.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._after: list[torch.Tensor | None] = []
        self._replayed: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> None:
        self._after = [module._buffers[name] for module, name, _ in self._before]
        for module, name, buffer in self._before:
            module._buffers[name] = buffer.clone()
        self._replayed = self._chance()
        self._replayed.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replayed.__exit__(kind, error, trace)
        for (module, name, _), buffer in zip(self._before, self._after, strict=True):
            module._buffers[name] = buffer
