"""spec.trainer.optimizer.groups: numbers of their own for some of the parameters."""

from typing import Annotated

from pydantic import Field, StringConstraints

from disttrain.api.base import Model, Rule
from disttrain.api.types import Number


class OptimizerGroup(Model):
    """Parameters by their names."""

    RULES = (
        Rule(
            cel="has(self.weightDecay) || has(self.learningRate)",
            check=lambda g: g.weight_decay is not None or g.learning_rate is not None,
            message="set weightDecay or learningRate",
        ),
    )
    match: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    """A regular expression of Python, found anywhere in the names of named_parameters()."""
    weight_decay: Number | None = None
    """Default: that of the optimizer."""
    learning_rate: Number | None = None
    """Default: that of the optimizer. The schedule multiplies it, too."""


OptimizerGroups = Annotated[tuple[OptimizerGroup, ...], Field(max_length=16)]
