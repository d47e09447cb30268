"""What the operations of a group over connections of ours do with tensors: as vectors in the host's memory, piece by piece."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist

PIECE: Final = 512 << 10
"""Bytes that are read and added at once: they stay in the processor's cache in between."""
Tensors = Sequence[torch.Tensor]
Combine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""Puts one of two into a third."""


def _into(function: Callable[..., object]) -> Combine:
    return lambda one, other, out: function(one, other, out=out)


Op: Final[Any] = dist.ReduceOp.RedOpType
_COMBINE: Final[dict[Any, Combine]] = {
    Op.SUM: _into(torch.add),
    Op.AVG: _into(torch.add),
    Op.PRODUCT: _into(torch.mul),
    Op.MIN: _into(torch.minimum),
    Op.MAX: _into(torch.maximum),
    Op.BAND: _into(torch.bitwise_and),
    Op.BOR: _into(torch.bitwise_or),
    Op.BXOR: _into(torch.bitwise_xor),
}


class Flat:
    """Makes a tensor one of one dimension whose elements are neighbours in the memory of the host; where that takes a copy, `finish`
    copies it back."""

    def __init__(self) -> None:
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, tensor: torch.Tensor, *, written: bool = False) -> torch.Tensor:
        tensor = tensor.detach()
        if is_plain(tensor):
            return tensor.view(-1)
        flat = tensor.contiguous().cpu()
        if written:
            self._copies.append((tensor, flat))
        return flat.view(-1)

    def finish(self) -> None:
        for tensor, flat in self._copies:
            tensor.copy_(flat)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether its elements are neighbours in the memory of the host."""
    return tensor.is_cpu and tensor.is_contiguous()


def combine_of(options: Any) -> Combine:
    """The operation of c10d's options. Raises ValueError for one that is not done."""
    found = _COMBINE.get(options.reduceOp.op)
    if found is None:
        raise ValueError(
            f"{options.reduceOp.op} is not done over TLS; use one of {', '.join(op.name for op in _COMBINE)}"
        )
    return found


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Nothing where both are the same memory."""
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)


def pieces(vector: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a vector, of PIECE bytes or less."""
    return iter(torch.split(vector, max(1, PIECE // vector.itemsize)))
