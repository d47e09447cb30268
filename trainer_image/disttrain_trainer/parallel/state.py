"""The state of a model and its optimiser as named tensors: to be saved, loaded, and sent to the other ranks.

Not here: when this happens (data.py), files and folders (checkpoint/).
"""

import hashlib

import torch
import torch.distributed as dist
from torch import nn

from disttrain_trainer.checkpoint.tensors import NamedTensors
from disttrain_trainer.parallel.group import BrokenGroup, Wires
from disttrain_trainer.parallel.optimizer import FlatOptimizer


class State(NamedTensors):
    """What a rank must hold to go on at a step. Every rank has the same tensors, by name and shape; only values differ."""

    def __init__(self, model: nn.Module, optimizer: FlatOptimizer) -> None:
        state = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        for slot, tensors in optimizer.state.items():
            state |= {f"optimizer.{number}.{slot}": tensor for number, tensor in enumerate(tensors)}

        def present() -> dict[str, torch.Tensor]:
            return state | {f"model.{name}": buffer.detach() for name, buffer in model.named_buffers()}

        super().__init__(present)
        shapes = sorted((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in present().items())
        self.layout = hashlib.sha256(repr(shapes).encode()).hexdigest()
        """The same for every rank whose state this rank can take over: names, types and shapes, before any training."""

    def broadcast(self, *, source: int, step: int, device: torch.device, wires: Wires) -> int:
        """Gives every rank the state of `source`, and returns its step. Raises BrokenGroup when a peer is lost.

        Then any rank but the source may hold a mixture of two states.
        """
        try:
            count = torch.tensor(step, device=device)
            _send(count, source, wires)
            for tensor in self._present().values():
                dense = tensor.contiguous()
                _send(dense, source, wires)
                if dense is not tensor:
                    tensor.copy_(dense)
        except RuntimeError as error:
            raise BrokenGroup(error) from None
        return int(count.item())


def _send(tensor: torch.Tensor, source: int, wires: Wires) -> None:
    """Gives every rank the tensor of `source`. Raises RuntimeError when a peer is lost."""
    work = dist.broadcast(tensor, source, async_op=True)
    assert work is not None
    if tensor.is_cuda:
        work.wait()
        return
    wires.awaited(work, tensor).wait()
    if wires.error is not None:
        raise wires.error
