"""The buffers of a replicated model (BatchNorm's running statistics): after each step every rank has those of rank 0, which has part 0.

As broadcast_buffers of torch's DistributedDataParallel, but after the step, so that each rank can save and evaluate what all have. The
bytes of all buffers travel as one tensor, beside the last bucket of gradients.
"""

import torch
from torch import nn

from disttrain_trainer.checkpoint import tensors

_ALIGNMENT = 16
"""Bytes, the widest element: a buffer's place can then be viewed as its type."""


class SharedBuffers:
    """The buffers of one rank. Make it when all ranks have buffers of the same forms, as after the state of one was given to all."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        found = tensors.buffers_of(model)
        self._forms = {name: (buffer.shape, buffer.dtype) for name, buffer in found.items()}
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, buffer in found.items():
            start, end = end, end + buffer.numel() * buffer.dtype.itemsize
            places[name], end = (start, end), -(-end // _ALIGNMENT) * _ALIGNMENT
        self.bytes = torch.zeros(end, dtype=torch.uint8, device=device)
        """What travels from rank 0 to the others."""
        self._views = {
            name: self.bytes[start:stop].view(found[name].dtype).view(found[name].shape)
            for name, (start, stop) in places.items()
        }

    def pack(self, *, gives: bool) -> bool:
        """Copies the buffers into `bytes` (uint8, one-dimensional), on rank 0 alone (`gives`). Call it before they are sent.

        False when a buffer has changed its shape or dtype since the round began: then `bytes` are not to be used.
        """
        found = tensors.buffers_of(self._model)
        if {name: (buffer.shape, buffer.dtype) for name, buffer in found.items()} != self._forms:
            return False
        if gives:
            for name, view in self._views.items():
                view.copy_(found[name])
        return True

    def take(self) -> None:
        """Copies `bytes` into the buffers of the model. Call it after they came from rank 0."""
        tensors.put_buffers(self._model, self._views, source="the state of worker-0")
