"""Gradients summed over all ranks while backward still runs: the flat gradient in buckets, each reduced as soon as it is whole.

Why not DistributedDataParallel: it imports torch._dynamo, which takes longer than torch itself and delays every start and every
replacement; and its errors come out of backward, where a lost peer cannot be told from the user's own mistake. Here only this module's own
calls can raise BrokenGroup. Not here: process groups (group.py), weights of samples (the loop scales the loss).
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from disttrain_trainer.errors import UserError
from disttrain_trainer.parallel.group import BrokenGroup
from disttrain_trainer.parameter_server.layout import FlatModel

BUCKET_BYTES = 4 << 20
"""As large as keeps a link busy, as small as overlaps with backward; torch's DDP has 25 MB, BytePS 4."""


@dataclass(slots=True)
class _Bucket:
    vector: torch.Tensor
    """A part of the flat gradient."""
    parameters: int
    waiting: int = 0
    """Parameters whose gradient is not there yet."""


class Reducer:
    """Sums the gradients of a flat model over the default process group."""

    def __init__(self, model: torch.nn.Module, flat: FlatModel) -> None:
        self._buckets: list[_Bucket] = []
        """In the order in which backward fills them: from the last parameter to the first."""
        self._next = 0
        self._work: list[dist.Work] = []
        self._error: RuntimeError | None = None
        self._hooks = []
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for gradient in flat.gradients():
            chosen = [(name, p) for name, p in named if p.dtype == gradient.dtype]
            for first, last in _cut([p.numel() * p.itemsize for _, p in chosen]):
                bucket = _Bucket(vector=_span(gradient, [p for _, p in chosen[first:last]]), parameters=last - first)
                self._buckets.append(bucket)
                for name, parameter in chosen[first:last]:
                    assert parameter.grad is not None, "a flat model has all its gradients"
                    arrived = partial(self._arrived, bucket, name, parameter.grad)
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(arrived))  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Before each backward."""
        self._next, self._error = 0, None
        for bucket in self._buckets:
            bucket.waiting = bucket.parameters

    def finish(self) -> None:
        """After each backward: reduces what no gradient came for, and waits. Raises BrokenGroup when a peer is lost."""
        for bucket in self._buckets:
            bucket.waiting = 0
        self._launch()
        try:
            while self._work and self._error is None:
                self._work.pop(0).wait()
        except RuntimeError as error:
            self._error = error
        if self._error is not None:
            self._work.clear()
            raise BrokenGroup(self._error) from None

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, bucket: _Bucket, name: str, view: torch.Tensor, parameter: torch.Tensor) -> None:
        if not bucket.waiting:
            raise UserError(
                f"parameter {name} got its gradient twice in one backward, as with re-entrant checkpointing; "
                "call torch.utils.checkpoint with use_reentrant=False"
            )
        if parameter.grad is not view and parameter.grad is not None:  # the user's code took the gradient away
            view.copy_(parameter.grad)
            parameter.grad = view
        bucket.waiting -= 1
        if not bucket.waiting:
            self._launch()

    def _launch(self) -> None:
        """Sends the buckets that are whole, always in the same order: ranks whose graphs differ must still send the same."""
        while self._error is None and self._next < len(self._buckets) and not self._buckets[self._next].waiting:
            try:
                work = dist.all_reduce(self._buckets[self._next].vector, async_op=True)
            except RuntimeError as error:
                self._error = error
                return
            assert work is not None
            self._work.append(work)
            self._next += 1


def _cut(sizes: list[int]) -> list[tuple[int, int]]:
    """[first, last) of each bucket, from the end to the beginning."""
    cuts, last, held = [], len(sizes), 0
    for index in range(len(sizes) - 1, -1, -1):
        held += sizes[index]
        if held >= BUCKET_BYTES or index == 0:
            cuts.append((index, last))
            last, held = index, 0
    return cuts


def _span(vector: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The part of the flat gradient in which these neighbours' gradients lie."""
    gradients = [parameter.grad for parameter in parameters]
    first, last = gradients[0], gradients[-1]
    assert first is not None
    assert last is not None
    return vector[first.storage_offset() : last.storage_offset() + last.numel()]
