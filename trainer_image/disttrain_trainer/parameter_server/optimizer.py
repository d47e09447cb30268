"""SGD, Adam and AdamW on the flat parts of a shard: torch's own fused kernels, called block by block.

All three are element-wise: element i of the result depends on element i of parameters, gradient and state alone, so that
cutting a model over servers changes nothing. (LAMB, LARS, Muon and a clip by norm are not, and are not here.)

Not bitwise for free: the fused kernels compute the last few elements of a call without fused multiply-add. So callers pad every
part, and cut blocks, to a multiple of `PADDING` elements; then each element takes the vector path, however the model was cut.
"""

from collections.abc import Sequence

import torch

from disttrain.api.optimizer import Optimizer as Settings
from disttrain.api.optimizer import OptimizerName
from disttrain.api.strategy import ParameterServerStrategy
from disttrain_trainer.model.update_rule import UpdateRule, rules_of
from disttrain_trainer.runtime.memory import zeros

PADDING = 64
"""Elements. More than one turn of the widest kernel: 64 B registers of the narrowest dtype, twice unrolled."""


def settings_of(strategy: ParameterServerStrategy, inner: Settings) -> Settings:
    """The servers' optimiser: the job's own, or with local steps the outer one, plain SGD with momentum. inner: trainer.optimizer."""
    outer = strategy.outer_optimizer
    if outer is None:
        return inner
    return Settings(
        name=OptimizerName.SGD,
        learning_rate=outer.learning_rate,
        momentum=outer.momentum or None,
        nesterov=outer.nesterov,
    )


class Optimizer:
    """The job's optimiser (SGD, Adam, AdamW with the rules of torch.optim) over the parts of one shard. Call `bind` first; not thread-safe.

    Its kernels update the parameters in place; where the result goes elsewhere they work on a scratch block that stays in the cache.
    """

    def __init__(self, settings: Settings) -> None:
        self._rules = rules_of(settings)
        self.groups = len(self._rules)
        """Groups of parameters; 0 is that of those that no match names."""
        self._rule = self._rules[0]
        self.name = self._rule.name
        self.slots = self._rule.slots
        """The state beside each part; also the names in a saved shard."""
        self.updates = 0
        """Optimiser steps taken: Adam's t."""
        self._state: list[dict[str, torch.Tensor]] = []
        self._scratch: list[torch.Tensor] = []

    def bind(self, parts: Sequence[torch.Tensor], *, block: int) -> None:
        """Resets the state to zeros, shaped like these parts (padded, one-dimensional). block: the most elements of a `step`."""
        self.updates = 0
        self._state = [{slot: zeros(len(part), part.dtype) for slot in self.slots} for part in parts]
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
        rate: float = 1.0,
        group: int = 0,
    ) -> None:
        """Updates a block, the elements `block` of part number `part`, with `scale` times the gradient.

        block: within the part. parameters, gradient, out: one-dimensional, as long as the block, of the part's dtype.
        missed: how many of the optimiser's steps these elements took no part in. rate: what the learning rate is multiplied by. group: of
        all these elements.

        The result goes to `out`: `parameters` or `gradient` itself. `gradient` is lost. One optimiser step is a call for every block
        of every part, and then `advance` once.
        """
        if not self.slots:  # plain SGD: one pass over the memory, and no scratch
            self._descend(self._rules[group], parameters, gradient, scale=scale, out=out, rate=rate)
            return
        if scale != 1.0:
            gradient.mul_(scale)
        updated = parameters if out is parameters else self._scratch[part][: len(parameters)].copy_(parameters)
        state = {slot: [tensor[block]] for slot, tensor in self._state[part].items()}
        updates = [torch.tensor(float(self.updates - missed), dtype=torch.float32)] if self._rule.is_adaptive else []
        self._rules[group].step([updated], [gradient], state, updates, rate=rate)
        if updated is not out:
            out.copy_(updated)

    def _descend(
        self,
        rule: UpdateRule,
        parameters: torch.Tensor,
        gradient: torch.Tensor,
        *,
        scale: float,
        out: torch.Tensor,
        rate: float,
    ) -> None:
        """Stochastic gradient descent with an L2 penalty, as torch.optim.SGD without momentum."""
        if rule.weight_decay:
            gradient.mul_(scale).add_(parameters, alpha=rule.weight_decay)
            scale = 1.0
        torch.add(parameters, gradient, alpha=-rule.learning_rate * rate * scale, out=out)

    def advance(self) -> None:
        """Ends an optimiser step: the count of updates, Adam's t, grows by one."""
        self.updates += 1

    def state(self) -> list[dict[str, torch.Tensor]]:
        """The state of each part, by slot: one-dimensional tensors as long as the part. They are the tensors in use, and no copies."""
        return self._state
