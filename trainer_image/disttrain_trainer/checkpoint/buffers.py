"""A worker's buffers, such as BatchNorm's running statistics, in the checkpoints of parameter servers, which know parameters only.

Each worker has its own; a checkpoint has those of one of them.
"""

import secrets
from pathlib import Path

from torch import nn

from disttrain_trainer.checkpoint import tensor_file, tensors
from disttrain_trainer.checkpoint.store import BUFFERS
from disttrain_trainer.errors import PeerLost, WrongInput


class Buffers:
    """The buffers of this model. root: the checkpoint folder, if there is one; then WrongInput for a buffer that cannot be saved."""

    def __init__(self, model: nn.Module, root: Path | None) -> None:
        if root is not None:
            tensors.check_buffers(model)
        self.there_are_some = tensors.may_have_buffers(model)
        self._model = model
        self._root = root

    def restore(self, name: str) -> None:
        """Takes over a file of the checkpoint folder. Raises PeerLost when it is gone: the next round names a newer one."""
        if self._root is None:
            return
        file = self._root / name
        try:
            values = tensor_file.read(file)
        except WrongInput:
            if file.exists():
                raise
            raise PeerLost(name, "a newer checkpoint took its place") from None
        tensors.put_buffers(self._model, values, source=str(file))

    def reset(self, first: nn.Module) -> None:
        """Takes over the buffers of another model of the same kind."""
        tensors.copy_buffers(self._model, first)

    def save(self, folder: str) -> dict[str, object]:
        """Writes a file into a checkpoint. Returns the fields of SAVED.

        Under a new name: the master may have asked another worker meanwhile, or this one twice, and a file that a manifest names
        must not change.
        """
        if self._root is None:
            return {"error": "it has no checkpoint volume"}
        path = self._root / folder / f"{BUFFERS}{secrets.token_hex(4)}.safetensors"
        try:
            return {"file": path.name, "sha256": tensor_file.write(path, tensors.buffers_of(self._model))}
        except OSError as error:
            return {"error": str(error)}
