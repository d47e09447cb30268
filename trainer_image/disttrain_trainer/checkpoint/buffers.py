"""What a worker adds to the checkpoints of parameter servers, which know flat vectors of trained parameters only.

Its buffers, such as BatchNorm's running statistics (under Sync those of the step; otherwise each worker has its own), the parameters that
are not trained, which the user's code may change (the target network of BYOL or MoCo), and how the model lies in the vectors: with that the
checkpoint can name every tensor.
"""

import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from disttrain.api.tensor_index import FROZEN, LAYOUT, MODEL, SCRIPT, Layout
from disttrain_trainer.checkpoint import tensor_file, tensors
from disttrain_trainer.checkpoint.background import HostCopy
from disttrain_trainer.checkpoint.by_name import NamedCheckpoint
from disttrain_trainer.checkpoint.manifest import NAME as MANIFEST
from disttrain_trainer.checkpoint.store import BUFFERS, STATE
from disttrain_trainer.errors import PeerLost, WrongInput


class Buffers:
    """The buffers of this model, and its parameters that are not trained. For the training thread.

    root: the checkpoint folder, or None; with one, a buffer that cannot be saved raises WrongInput.
    """

    def __init__(self, model: nn.Module, root: Path | None, layout: Layout | None = None) -> None:
        """layout: how the trained parameters lie in the servers' vectors."""
        if root is not None:
            tensors.check_buffers(model)
            tensors.check_extra_state(model)
        self._frozen = tensors.frozen_of(model)
        self.there_are_some = tensors.may_have_buffers(model) or bool(self._frozen)
        self._model = model
        self._root = root
        self.extra: Callable[[], dict[str, torch.Tensor]] = dict
        """Gives what is saved beside, under names that begin with SCRIPT."""
        self._copy = HostCopy()
        self._metadata = {LAYOUT: layout.model_dump_json(by_alias=True, exclude_defaults=True)} if layout else {}

    def restore(self, name: str) -> None:
        """Takes over a file of the checkpoint folder. Raises PeerLost when it is gone: the next round names a newer one."""
        if self._root is None:
            return
        file = self._root / name
        if file.name == MANIFEST:
            self._restore_by_name(file)
            return
        try:
            values = tensor_file.read(file)
        except WrongInput:
            if file.exists():
                raise
            raise PeerLost(name, "a newer checkpoint took its place") from None
        if file.name.startswith(STATE):  # of a collective, with everything else
            parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
            named = {key.removeprefix(MODEL): value for key, value in values.items() if key.startswith(MODEL)}
            frozen = {name: value for name, value in named.items() if name in self._frozen}
            buffers = {name: value for name, value in named.items() if name not in parameters}
        else:
            frozen = {key.removeprefix(FROZEN): value for key, value in values.items() if key.startswith(FROZEN)}
            buffers = {name: value for name, value in values.items() if not name.startswith((FROZEN, SCRIPT))}
        tensors.put_frozen(self._frozen, frozen, source=str(file))
        tensors.put_buffers(self._model, buffers, source=str(file))

    def _restore_by_name(self, manifest: Path) -> None:
        """Takes over those of a checkpoint that has them in several files."""
        if not manifest.exists():
            raise PeerLost(manifest.parent.name, "a newer checkpoint took its place")
        with NamedCheckpoint(manifest.parent) as checkpoint:
            there, own = checkpoint.manifest.tensors, tensors.buffers_of(self._model)
            frozen = {name: checkpoint.tensor(name) for name in self._frozen if name in there}
            buffers = {name: checkpoint.tensor(name) for name in own if name in there}
        tensors.put_frozen(self._frozen, frozen, source=str(manifest.parent))
        tensors.put_buffers(self._model, buffers, source=str(manifest.parent))

    def reset(self, first: nn.Module) -> None:
        """Copies the buffers and untrained parameters of another model, which the same factory made."""
        tensors.put_frozen(self._frozen, tensors.frozen_of(first), source="trainer.model")
        tensors.copy_buffers(self._model, first)

    def save(self, folder: str) -> Callable[[], dict[str, object]]:
        """Copies the buffers; what is returned writes the copy into a checkpoint, and returns the fields of SAVED. One copy at a time.

        Under a new name: the master may have asked another worker meanwhile, or this one twice, and a file that a manifest names
        must not change.
        """
        copy, root = self._copy.take(self._present()), self._root

        def write() -> dict[str, object]:
            if root is None:
                return {"error": "it has no checkpoint volume"}
            path = root / folder / f"{BUFFERS}{secrets.token_hex(4)}.safetensors"
            try:
                return {"file": path.name, "digest": tensor_file.write(path, copy, self._metadata)}
            except OSError as error:
                return {"error": str(error)}

        return write

    def _present(self) -> dict[str, torch.Tensor]:
        frozen = {
            f"{FROZEN}{name}": parameter.detach()
            for name, parameter in self._frozen.items()
            if tensors.can_be_saved(parameter)
        }
        return frozen | tensors.buffers_of(self._model) | self.extra()
