"""Named tensors in a file of a checkpoint. safetensors, never pickle: a checkpoint cannot bring code.

Not here: which tensors (parallel/state.py, worker.py), and when they are saved.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from disttrain_trainer.errors import WrongInput


class NamedTensors:
    """Tensors of a model that are saved and loaded in place.

    tensors: asked at each use, since a model may put another tensor in a buffer's place: `self.mean = 0.9 * self.mean + …`.
    """

    def __init__(self, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._present = tensors

    def save(self, path: Path) -> None:
        """Writes a file. Raises OSError."""
        # Copies: tied or expanded buffers share memory, which the format refuses. Not on a GPU, which may be full of the originals.
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self._present().items()}
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
        present = self._present()
        for name in {*saved, *present}:
            theirs, ours = saved.get(name), present.get(name)
            if theirs is None or ours is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                shapes = ["missing" if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (theirs, ours)]
                raise WrongInput(
                    f"trainer.model: {path} is of another model: {name} is {shapes[0]} there, {shapes[1]} here"
                )
        self.take(saved)

    def take(self, values: Mapping[str, torch.Tensor]) -> None:
        """Takes over these values, one for each tensor."""
        with torch.no_grad():
            for name, tensor in self._present().items():
                tensor.copy_(values[name])
