"""SGD, Adam and AdamW on the flat parts of a shard: torch's own fused kernels, called block by block.

All three are element-wise: element i of the result depends on element i of parameters, gradient and state alone, so that
cutting a model over servers changes nothing. (LAMB, LARS, Muon and a clip by norm are not, and are not here.)

Not bitwise for free: the fused kernels compute the last few elements of a call without fused multiply-add. So callers pad every
part, and cut blocks, to a multiple of `PADDING` elements; then each element takes the vector path, wherever the model was cut.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from disttrain.api import spec
from disttrain_trainer.model.memory import zeros

PADDING = 64
"""Elements. More than one turn of the widest kernel: 64 B registers of the narrowest dtype, twice unrolled."""


class Optimizer(ABC):
    """An optimiser over the parts of one shard. Bind it to parts before anything else; not thread-safe."""

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]]
    """The state beside each part; also the names in a saved shard."""

    def __init__(self, settings: spec.Optimizer) -> None:
        self.learning_rate = settings.learning_rate
        self.weight_decay = settings.weight_decay
        self.updates = 0
        """Optimiser steps taken: Adam's t."""
        self._state: list[dict[str, torch.Tensor]] = []

    def bind(self, parts: Sequence[torch.Tensor], *, block: int) -> None:
        """Resets the state to zeros, shaped like these (padded) parts. block: the most elements of a `step`."""
        self.updates = 0
        self._state = [{slot: zeros(len(part), part.dtype) for slot in self.slots} for part in parts]

    @abstractmethod
    def step(
        self,
        part: int,
        block: slice,
        parameters: torch.Tensor,
        gradient: torch.Tensor,
        *,
        scale: float,
        out: torch.Tensor,
        missed: int = 0,
    ) -> None:
        """Updates a block, the elements `block` of part number `part`, with `scale` times the gradient.

        missed: how many of the optimiser's steps these elements took no part in.

        The result goes to `out`: `parameters` or `gradient` itself. `gradient` is lost. One optimiser step is a call for every block
        of every part, and then `advance` once.
        """

    def advance(self) -> None:
        """Ends an optimiser step."""
        self.updates += 1

    def state(self) -> list[dict[str, torch.Tensor]]:
        """The state of each part, by slot; the tensors themselves."""
        return self._state


class _InPlace(Optimizer):
    """An optimiser whose kernel updates the parameters in place; elsewhere it works on a scratch block that stays in the cache."""

    def bind(self, parts: Sequence[torch.Tensor], *, block: int) -> None:
        super().bind(parts, block=block)
        self._scratch = [torch.empty_like(part[:block]) for part in parts]

    def step(
        self,
        part: int,
        block: slice,
        parameters: torch.Tensor,
        gradient: torch.Tensor,
        *,
        scale: float,
        out: torch.Tensor,
        missed: int = 0,
    ) -> None:
        if scale != 1.0:
            gradient.mul_(scale)
        state = {slot: tensor[block] for slot, tensor in self._state[part].items()}
        if out is parameters:
            self._step(parameters, gradient, state, self.updates - missed)
        else:
            scratch = self._scratch[part][: len(parameters)].copy_(parameters)
            self._step(scratch, gradient, state, self.updates - missed)
            out.copy_(scratch)

    @abstractmethod
    def _step(
        self, parameters: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, torch.Tensor], updates: int
    ) -> None: ...


class SGD(Optimizer):
    """Stochastic gradient descent with an L2 penalty, as torch.optim.SGD without momentum."""

    name = "SGD"
    slots: ClassVar[tuple[str, ...]] = ()

    def step(
        self,
        part: int,
        block: slice,
        parameters: torch.Tensor,
        gradient: torch.Tensor,
        *,
        scale: float,
        out: torch.Tensor,
        missed: int = 0,
    ) -> None:
        if self.weight_decay:
            gradient.mul_(scale).add_(parameters, alpha=self.weight_decay)
            scale = 1.0
        torch.add(parameters, gradient, alpha=-self.learning_rate * scale, out=out)


class MomentumSGD(_InPlace):
    """SGD with momentum, or Nesterov's, as torch.optim.SGD with dampening 0.

    The momentum starts at 0, where torch starts with the first gradient: without dampening that is the same.
    """

    name = "SGD"
    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    def __init__(self, settings: spec.Optimizer) -> None:
        super().__init__(settings)
        self.momentum = settings.momentum or 0.0
        self.nesterov = settings.nesterov

    def _step(
        self, parameters: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, torch.Tensor], updates: int
    ) -> None:
        sgd(
            [parameters],
            [gradient],
            [state["momentum"]],
            fused=True,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
        )


class Adam(_InPlace):
    """Kingma & Ba, ICLR 2015, with an L2 penalty, as torch.optim.Adam."""

    name = "Adam"
    slots: ClassVar[tuple[str, ...]] = ("mean", "square")
    decoupled: ClassVar[bool] = False

    def __init__(self, settings: spec.Optimizer) -> None:
        super().__init__(settings)
        self.beta1 = settings.beta1 if settings.beta1 is not None else 0.9
        self.beta2 = settings.beta2 if settings.beta2 is not None else 0.999
        self.epsilon = settings.epsilon if settings.epsilon is not None else 1e-8

    def _step(
        self, parameters: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, torch.Tensor], updates: int
    ) -> None:
        adam(
            [parameters],
            [gradient],
            [state["mean"]],
            [state["square"]],
            [],
            [torch.tensor(float(updates), dtype=torch.float32)],  # the kernel adds 1
            fused=True,
            decoupled_weight_decay=self.decoupled,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            eps=self.epsilon,
            maximize=False,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019), as torch.optim.AdamW."""

    name = "AdamW"
    decoupled: ClassVar[bool] = True


def build(settings: spec.Optimizer) -> Optimizer:
    """The optimiser that the job names."""
    match settings.name:
        case spec.OptimizerName.SGD:
            return MomentumSGD(settings) if settings.momentum else SGD(settings)
        case spec.OptimizerName.ADAM:
            return Adam(settings)
        case spec.OptimizerName.ADAMW:
            return AdamW(settings)
