"""The job's optimiser on the blocks of a sharded model: each rank updates what it holds, by torch's fused kernels.

SGD, Adam and AdamW work element by element, so that blocks need nothing of one another. A parameter that took no part in a step on any
rank is left as it is, with its state and its count of steps.
"""

from collections.abc import Collection

import torch

from disttrain.api.optimizer import Optimizer as Settings
from disttrain_trainer.model.parameter_groups import group_of
from disttrain_trainer.model.update_rule import rules_of
from disttrain_trainer.parallel.sharded_model import ShardedModel


class ShardOptimizer:
    """The state of one rank's blocks."""

    def __init__(self, settings: Settings, model: ShardedModel) -> None:
        self._rules = rules_of(settings)
        self._rule = self._rules[0]
        self._model = model
        self._groups = [group_of(settings, piece.name) for piece in model.trained]
        self.slots = {slot: [torch.zeros_like(piece.local) for piece in model.trained] for slot in self._rule.slots}
        """One tensor for each trained parameter of this rank, in the shape of its block."""
        device = model.trained[0].local.device if model.trained else torch.device("cpu")
        self.updates = torch.zeros(len(model.trained) if self._rule.is_adaptive else 0, device=device)
        """Steps that each of them has taken, float32; empty where the rule does not count them."""

    def step(self, took_part: Collection[int], *, rate: float = 1.0) -> None:
        """Updates the blocks in place. took_part: numbers of the parameters that had a gradient on some rank. rate: what the learning rate
        is multiplied by."""
        chosen = [
            (number, piece.local, gradient)
            for number, piece in enumerate(self._model.trained)
            if piece.number in took_part and (gradient := self._model.gradient(piece)) is not None
        ]
        filled = [(number, local, gradient) for number, local, gradient in chosen if local.numel()]
        with torch.no_grad():
            if self._rule.is_adaptive:
                for number, local, _ in chosen:
                    if not local.numel():
                        self.updates[number] += 1
            for group, rule in enumerate(self._rules):
                if mine := [one for one in filled if self._groups[one[0]] == group]:
                    rule.step(
                        [local for _, local, _ in mine],
                        [gradient for _, _, gradient in mine],
                        {slot: [values[number] for number, _, _ in mine] for slot, values in self.slots.items()},
                        [self.updates[number] for number, _, _ in mine] if rule.is_adaptive else [],
                        rate=rate,
                    )
