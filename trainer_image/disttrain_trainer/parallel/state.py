"""The state of a model and its optimiser as named tensors: to be saved, loaded, and sent to the other ranks.

safetensors, never pickle: a checkpoint, or a peer, cannot bring code. Not here: when this happens (data.py), folders (checkpoint/).
"""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.parallel.group import BrokenGroup
from disttrain_trainer.parallel.optimizer import FlatOptimizer

FILE = "state.safetensors"


class State:
    """What a rank must hold to go on at a step. Every rank has the same tensors, by name and shape; only values differ."""

    def __init__(self, model: nn.Module, optimizer: FlatOptimizer) -> None:
        self._tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        self._tensors |= {f"model.{name}": buffer for name, buffer in model.named_buffers()}
        for slot, tensors in optimizer.state.items():
            self._tensors |= {f"optimizer.{number}.{slot}": tensor for number, tensor in enumerate(tensors)}

    def save(self, path: Path) -> None:
        """Writes a file. Raises OSError."""
        # Tied or expanded buffers share memory, which the format refuses.
        tensors = {name: tensor.contiguous().clone() for name, tensor in self._tensors.items()}
        try:
            save_file(tensors, path)
        except SafetensorError as error:  # it wraps what the file system said
            raise OSError(str(error)) from None

    def load(self, path: Path) -> None:
        """Takes over a file's values. Raises WrongInput when it is damaged, or of another model."""
        try:
            with safe_open(path, framework="pt") as file:
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise WrongInput(f"{path} cannot be read: {error}") from None
        for name in {*saved, *self._tensors}:
            theirs, ours = saved.get(name), self._tensors.get(name)
            if theirs is None or ours is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                shapes = ["missing" if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (theirs, ours)]
                raise WrongInput(f"{path} is of another model: {name} is {shapes[0]} there, {shapes[1]} here")
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(saved[name])

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
