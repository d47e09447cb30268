"""The buffers of a model (BatchNorm's running statistics) where one process computes several parts of a step.

Every part of a step starts from the buffers of the step; those of the next step are what part 0 leaves. So they are a function of part
numbers alone, and not of who computes which part. The same holds for parameters that are not trained and that the user's code changes,
such as the target network of BYOL.
"""

import torch
from torch import nn

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
        self._changing: dict[str, nn.Parameter] | None = None
        """The frozen parameters that the user's code changes; None before the first step."""
        self._versions: list[int] = []
        self._there_are_some = tensors.may_have_buffers(model) or bool(self._frozen)
        self._step: dict[str, torch.Tensor] = {}
        self._frozen_of_step: dict[str, torch.Tensor] = {}
        self._next: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None

    def begin(self) -> None:
        """Before the first part of a step."""
        if not self._there_are_some:
            return
        self._next = None
        self._step, self._frozen_of_step = self._copies(self._frozen if self._changing is None else self._changing)
        self._versions = [parameter._version for parameter in self._frozen.values()]

    def between(self, *, step: int) -> None:
        """After a part that is not the last one of the step. Raises UserError."""
        if not self._there_are_some:
            return
        self._keep(step)
        self._put(self._step, self._frozen_of_step)

    def end(self, *, step: int) -> None:
        """After the last part of the step: the buffers of the next step take their place. Raises UserError."""
        if not self._there_are_some:
            return
        self._keep(step)
        assert self._next is not None
        self._put(*self._next)

    def _keep(self, step: int) -> None:
        """Keeps what the first part has left, and refuses what cannot be undone."""
        changed = {
            name: parameter
            for (name, parameter), version in zip(self._frozen.items(), self._versions, strict=True)
            if parameter._version != version
        }
        if self._changing is None:
            self._changing = changed
            self._frozen_of_step = {name: self._frozen_of_step[name] for name in changed}
        elif new := changed.keys() - self._changing.keys():
            raise UserError(
                f"parameter {min(new)}, which is not trained, was changed in step {step} and not in the first one: where a worker process "
                "computes several parts of a step, change it in every step, or register it as a buffer"
            )
        if self._next is None:
            self._next = self._copies(self._changing)

    def _copies(self, frozen: dict[str, nn.Parameter]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        buffers = {name: buffer.clone() for name, buffer in tensors.buffers_of(self._model).items()}
        return buffers, {name: parameter.detach().clone() for name, parameter in frozen.items()}

    def _put(self, buffers: dict[str, torch.Tensor], frozen: dict[str, torch.Tensor]) -> None:
        tensors.put_buffers(self._model, buffers, source="the step")
        tensors.put_frozen(self._changing or {}, frozen, source="the step")
        self._versions = [parameter._version for parameter in self._frozen.values()]
