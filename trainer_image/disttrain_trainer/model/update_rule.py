"""The job's optimiser, read once: its slots, and a step of torch's fused kernels on a list of tensors.

Who keeps the state is elsewhere: a rank for whole vectors (optimizers.py), a parameter server for blocks of its shard
(parameter_server/optimizer.py). By torch's functional interface: the constructor of a torch.optim.Optimizer imports torch._dynamo,
which takes longer than torch itself.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from disttrain.api.trainer import Optimizer as Settings
from disttrain.api.trainer import OptimizerName


class UpdateRule:
    """SGD, Adam (Kingma & Ba, ICLR 2015) or AdamW (Loshchilov & Hutter, ICLR 2019), with the defaults of torch.optim."""

    def __init__(self, settings: Settings) -> None:
        self.name = settings.name.value
        self.is_adaptive = settings.name is not OptimizerName.SGD
        """Whether a step depends on the number of steps before it: Adam and AdamW."""
        self.momentum = settings.momentum or 0.0
        self.learning_rate = settings.learning_rate
        self.weight_decay = settings.weight_decay
        self._nesterov = settings.nesterov
        self._decoupled = settings.name is OptimizerName.ADAMW
        self._beta1 = settings.beta1 if settings.beta1 is not None else 0.9
        self._beta2 = settings.beta2 if settings.beta2 is not None else 0.999
        self._epsilon = settings.epsilon if settings.epsilon is not None else 1e-8

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the tensors of state beside each tensor of parameters, which all start at 0; also their names in a checkpoint.

        torch's momentum starts with the first gradient. With dampening 0 that is the same as a start at 0.
        """
        if self.is_adaptive:
            return ("mean", "square")
        return ("momentum",) if self.momentum else ()

    def step(
        self,
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        state: Mapping[str, list[torch.Tensor]],
        updates: Sequence[torch.Tensor],
        *,
        rate: float = 1.0,
    ) -> None:
        """Updates parameters and state in place. Call it without gradients (`torch.no_grad`) where parameters require them.

        state: by slot. updates: for each tensor the steps that it has taken, float32 of no dimension, on its device; an adaptive rule
        adds 1. rate: what the learning rate is multiplied by.
        """
        if self.is_adaptive:
            adam(
                parameters,
                gradients,
                state["mean"],
                state["square"],
                [],
                list(updates),
                fused=True,
                decoupled_weight_decay=self._decoupled,
                amsgrad=False,
                beta1=self._beta1,
                beta2=self._beta2,
                lr=self.learning_rate * rate,
                weight_decay=self.weight_decay,
                eps=self._epsilon,
                maximize=False,
            )
        else:
            sgd(
                parameters,
                gradients,
                [*state["momentum"]] if self.momentum else [None] * len(parameters),
                fused=True,
                lr=self.learning_rate * rate,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                dampening=0.0,
                nesterov=self._nesterov,
                maximize=False,
            )
