"""The state of a model and its optimiser as named tensors: to be saved, loaded, and sent to the other ranks.

Not here: when this happens (data.py), files and folders (checkpoint/).
"""

import torch
import torch.distributed as dist
from torch import nn

from disttrain_trainer.checkpoint.tensors import NamedTensors
from disttrain_trainer.parallel.group import BrokenGroup
from disttrain_trainer.parallel.optimizer import FlatOptimizer

FILE = "state.safetensors"


class State(NamedTensors):
    """What a rank must hold to go on at a step. Every rank has the same tensors, by name and shape; only values differ."""

    def __init__(self, model: nn.Module, optimizer: FlatOptimizer) -> None:
        state = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        state |= {f"model.{name}": buffer for name, buffer in model.named_buffers()}
        for slot, tensors in optimizer.state.items():
            state |= {f"optimizer.{number}.{slot}": tensor for number, tensor in enumerate(tensors)}
        super().__init__(state)

    def broadcast(self, *, source: int, step: int, device: torch.device) -> int:
        """Gives every rank the state of `source`, and returns its step. Raises BrokenGroup when a peer is lost."""
        try:
            count = torch.tensor(step, device=device)
            dist.broadcast(count, source)
            for tensor in self._tensors.values():
                dense = tensor.contiguous()
                dist.broadcast(dense, source)
                if dense is not tensor:
                    tensor.copy_(dense)
        except RuntimeError as error:
            raise BrokenGroup(error) from None
        return int(count.item())
