"""The job's optimiser, read once: its slots, and a step of torch's fused kernels on a list of tensors.

Who keeps the state is elsewhere: a rank for whole vectors (optimizers.py), a parameter server for blocks of its shard
(parameter_server/optimizer.py). By the kernels that torch.optim calls for fused=True: the constructor of a torch.optim.Optimizer imports
torch._dynamo, which takes longer than torch itself, and what its functional interface does before the kernel takes three times as long as
the kernel of a small model.
"""

from collections.abc import Mapping, Sequence

import torch

from disttrain.api.optimizer import Optimizer as Settings
from disttrain.api.optimizer import OptimizerName
from disttrain.api.optimizer_group import OptimizerGroup


class UpdateRule:
    """SGD, Adam (Kingma & Ba, ICLR 2015) or AdamW (Loshchilov & Hutter, ICLR 2019), with the defaults of torch.optim."""

    def __init__(self, settings: Settings, group: OptimizerGroup | None = None) -> None:
        """group: the numbers that are other for its parameters."""
        if settings.name is None or settings.learning_rate is None:
            raise ValueError("trainer.optimizer names a factory")
        self.name = settings.name.value
        self.is_adaptive = settings.name is not OptimizerName.SGD
        """Whether a step depends on the number of steps before it: Adam and AdamW."""
        self.momentum = settings.momentum or 0.0
        self.learning_rate = settings.learning_rate
        self.weight_decay = settings.weight_decay
        if group is not None and group.learning_rate is not None:
            self.learning_rate = group.learning_rate
        if group is not None and group.weight_decay is not None:
            self.weight_decay = group.weight_decay
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
        dtypes = {parameter.dtype for parameter in parameters}
        if len(dtypes) == 1:
            self._update(parameters, gradients, state, updates, self.learning_rate * rate)
            return
        for dtype in dtypes:  # a kernel takes tensors of one
            chosen = [number for number, parameter in enumerate(parameters) if parameter.dtype is dtype]
            self._update(
                [parameters[number] for number in chosen],
                [gradients[number] for number in chosen],
                {slot: [values[number] for number in chosen] for slot, values in state.items()},
                [updates[number] for number in chosen] if self.is_adaptive else [],
                self.learning_rate * rate,
            )

    def _update(
        self,
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        state: Mapping[str, list[torch.Tensor]],
        updates: Sequence[torch.Tensor],
        learning_rate: float,
    ) -> None:
        """As `step`, of tensors of one dtype on one device."""
        if self.is_adaptive:
            steps = list(updates)
            torch._foreach_add_(steps, 1)
            kernel = torch._fused_adamw_ if self._decoupled else torch._fused_adam_
            kernel(
                parameters,
                gradients,
                state["mean"],
                state["square"],
                [],
                steps,
                amsgrad=False,
                beta1=self._beta1,
                beta2=self._beta2,
                lr=learning_rate,
                weight_decay=self.weight_decay,
                eps=self._epsilon,
                maximize=False,
            )
        else:
            torch._fused_sgd_(
                parameters,
                gradients,
                state["momentum"] if self.momentum else [],
                lr=learning_rate,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                dampening=0.0,
                nesterov=self._nesterov,
                maximize=False,
                is_first_step=False,
            )


def rules_of(settings: Settings) -> tuple[UpdateRule, ...]:
    """The rule of each group of parameters (parameter_groups.py). They differ in numbers alone, and so have the same slots."""
    return (UpdateRule(settings), *(UpdateRule(settings, group) for group in settings.groups))
