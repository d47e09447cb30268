"""torch's fused optimisers on flat vectors: one kernel a vector, instead of some for each parameter.

By torch's functional interface: the constructor of a torch.optim.Optimizer imports torch._dynamo, which takes longer than torch itself.
Not here: the servers' optimisers, which work on parts of a shard, block by block (parameter_server/optimizer.py).
"""

from collections.abc import Sequence

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from disttrain.api.spec import Optimizer as Settings
from disttrain.api.spec import OptimizerName


class FlatOptimizer:
    """The job's optimiser over these vectors, with the numbers and defaults of torch.optim.SGD, Adam and AdamW."""

    def __init__(self, settings: Settings, vectors: Sequence[torch.Tensor]) -> None:
        self._settings = settings
        self._vectors = list(vectors)
        self._rate = float(settings.learning_rate)
        self._decay = float(settings.weight_decay)
        self._momentum = float(settings.momentum or 0)
        self._betas = (float(settings.beta1 or "0.9"), float(settings.beta2 or "0.999"))
        self._epsilon = float(settings.epsilon or "1e-8")
        slots: tuple[str, ...] = ("mean", "square", "updates")
        if settings.name is OptimizerName.SGD:
            # A momentum that starts at 0 is torch's, which starts with the first gradient: dampening is 0.
            slots = ("momentum",) if self._momentum else ()
        self.state: dict[str, list[torch.Tensor]] = {
            slot: [v.new_zeros((), dtype=torch.float32) if slot == "updates" else torch.zeros_like(v) for v in vectors]
            for slot in slots
        }
        """One tensor for each vector, by slot; the tensors themselves."""

    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """Updates the vectors in place."""
        settings, state = self._settings, self.state
        with torch.no_grad():
            if settings.name is OptimizerName.SGD:
                sgd(
                    self._vectors,
                    list(gradients),
                    list(state.get("momentum", [None] * len(self._vectors))),
                    fused=True,
                    lr=self._rate,
                    weight_decay=self._decay,
                    momentum=self._momentum,
                    dampening=0.0,
                    nesterov=settings.nesterov,
                    maximize=False,
                )
            else:
                adam(
                    self._vectors,
                    list(gradients),
                    state["mean"],
                    state["square"],
                    [],
                    state["updates"],
                    fused=True,
                    decoupled_weight_decay=settings.name is OptimizerName.ADAMW,
                    amsgrad=False,
                    beta1=self._betas[0],
                    beta2=self._betas[1],
                    lr=self._rate,
                    weight_decay=self._decay,
                    eps=self._epsilon,
                    maximize=False,
                )
