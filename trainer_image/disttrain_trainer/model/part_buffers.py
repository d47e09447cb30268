"""The buffers of a model (BatchNorm's running statistics) in synchronous steps: which ones a part starts from, and which ones follow.

Rule: every part of a step starts from the buffers of the step; those of the next step are what part 0 leaves. So they are a function of
part numbers alone, and not of who computes which part. The same holds for parameters that are not trained and that the user's code changes,
such as the target network of BYOL.
"""

from collections.abc import Mapping

import safetensors.torch
import torch
from torch import nn

from disttrain.api.tensor_index import FROZEN
from disttrain_trainer.checkpoint import tensors
from disttrain_trainer.errors import UserError


class PartBuffers:
    """The buffers of one process between the parts of a step. For one thread.

    A frozen parameter is copied only if the user's code changes it, which must show in the first step: a copy of a large frozen model
    would cost as much memory as the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._frozen = tensors.frozen_of(model)
        self._changing: Mapping[str, nn.Parameter] | None = None
        """The frozen parameters that the user's code changes; None before the first step."""
        self._versions: list[int] = []
        self.there_are_some = tensors.may_have_buffers(model) or bool(self._frozen)
        self._step: dict[str, torch.Tensor] = {}
        self._next: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Before the first part of a step: the buffers are those of the step."""
        self._step = self._copies(self._frozen if self._changing is None else self._changing)
        self._note_versions()

    def left(self, *, step: int, part: int) -> None:
        """After a part, counted from 0 in its step: those of part 0 are kept for `advance`. Raises UserError."""
        changed = {
            name: parameter
            for (name, parameter), version in zip(self._frozen.items(), self._versions, strict=True)
            if parameter._version != version
        }
        if self._changing is None:
            self._changing = changed
        elif new := changed.keys() - self._changing.keys():
            raise UserError(
                f"parameter {min(new)}, which is not trained, was changed in step {step} and not in the first one: change it in every "
                "step, or register it as a buffer"
            )
        if not part:
            self._next = self._copies(self._changing)

    @property
    def changed_frozen(self) -> str | None:
        """The name of a parameter that is not trained and that the user's code changes, once a part was computed."""
        return next(iter(self._changing or ()), None)

    def restore(self) -> None:
        """Before another part of the same step."""
        self._put(self._step)

    def advance(self) -> None:
        """The buffers that part 0 left take their place."""
        self._put(self._next)

    def encoded(self) -> bytes:
        """What part 0 left, as the content of a safetensors file; what such a file cannot hold stays with each process."""
        named = {name: value.contiguous() for name, value in self._next.items() if tensors.can_be_saved(value)}
        return safetensors.torch.save(named)

    def take(self, encoded: bytes, *, own: bool = False) -> None:
        """Takes over what another process encoded. own: of that what this model has, where it is a part of the other's."""
        values = safetensors.torch.load(encoded)
        if own:
            present = tensors.buffers_of(self._model)
            values = {name: value for name, value in values.items() if name in present}
        self._put(values)

    def _copies(self, frozen: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        buffers = {name: buffer.clone() for name, buffer in tensors.buffers_of(self._model).items()}
        return buffers | {f"{FROZEN}{name}": parameter.detach().clone() for name, parameter in frozen.items()}

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        frozen = {key.removeprefix(FROZEN): value for key, value in values.items() if key.startswith(FROZEN)}
        # Of a step before the first change each of them has a copy: to write those that are never changed would cost time for nothing.
        changing = self._frozen if self._changing is None else self._changing
        tensors.put_frozen(dict(changing), frozen, source="the step")
        buffers = {name: value for name, value in values.items() if not name.startswith(FROZEN)}
        tensors.put_buffers(self._model, buffers, source="the step")
        self._note_versions()

    def _note_versions(self) -> None:
        self._versions = [parameter._version for parameter in self._frozen.values()]
