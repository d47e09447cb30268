"""Named tensors in a file of a checkpoint. safetensors, never pickle: a checkpoint cannot bring code.

Not here: which tensors (parallel/state.py, worker.py), and when they are saved.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from disttrain_trainer.errors import WrongInput


class NamedTensors:
    """Tensors of a model that are saved and loaded in place."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

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
