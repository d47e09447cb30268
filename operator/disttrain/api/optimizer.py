"""spec.trainer.optimizer: the optimiser of our loop."""

from enum import StrEnum

from pydantic import StrictBool

from disttrain.api.base import Model, Rule
from disttrain.api.optimizer_group import OptimizerGroups
from disttrain.api.types import Factory, Number, NumberBelow1


class OptimizerName(StrEnum):
    SGD = "SGD"
    ADAM = "Adam"
    ADAMW = "AdamW"


class Optimizer(Model):
    """The optimiser of our loop; on parameter servers it runs there."""

    RULES = (
        Rule(
            cel="has(self.name) != has(self.factory)",
            check=lambda o: (o.name is None) != (o.factory is None),
            message="set exactly one of name and factory",
        ),
        Rule(
            # CEL reads no string in the place of a number, not even to say that it is there: such an optimizer is not in [itself].
            cel="!has(self.name) || has(self.factory) || !(self in [self]) || has(self.learningRate)",
            check=lambda o: o.name is None or o.factory is not None or o.learning_rate is not None,
            message="learningRate is required with name",
        ),
        Rule(
            cel="has(self.name) || !has(self.factory) || !(has(self.learningRate) || has(self.momentum) || has(self.beta1) || "
            "has(self.beta2) || has(self.epsilon) || self.nesterov || self.weightDecay > 0.0 || self.groups.size() > 0)",
            check=lambda o: (
                o.name is not None
                or o.factory is None
                or not (
                    o.nesterov
                    or o.weight_decay
                    or o.groups
                    or any(x is not None for x in (o.learning_rate, o.momentum, o.beta1, o.beta2, o.epsilon))
                )
            ),
            message="sets all numbers itself: leave the other fields out, or take name in its place",
            field="factory",
            shows="factory",
        ),
        Rule(
            cel="!has(self.name) || self.name == 'SGD' || (!has(self.momentum) && !self.nesterov)",
            check=lambda o: o.name in (None, OptimizerName.SGD) or (o.momentum is None and not o.nesterov),
            message="momentum and nesterov belong to SGD; Adam and AdamW have beta1 and beta2",
            shows="name",
        ),
        Rule(
            cel="!self.nesterov || has(self.momentum)",
            check=lambda o: not o.nesterov or o.momentum is not None,
            message="nesterov needs momentum",
            field="nesterov",
            shows="nesterov",
        ),
        Rule(
            cel="!has(self.name) || self.name != 'SGD' || (!has(self.beta1) && !has(self.beta2) && !has(self.epsilon))",
            check=lambda o: (
                o.name is not OptimizerName.SGD or (o.beta1 is None and o.beta2 is None and o.epsilon is None)
            ),
            message="beta1, beta2 and epsilon belong to Adam and AdamW; SGD has momentum",
            shows="name",
        ),
        Rule(
            cel="self in [self]",
            check=None,
            message="write each of its numbers without quotes, such as learningRate: 0.003",
        ),
    )
    name: OptimizerName | None = None
    """SGD, Adam or AdamW. Exactly one of name and factory."""
    factory: Factory | None = None
    """package.module:function(parameters, config) -> a torch.optim.Optimizer; parameters is a list, config is trainer.config. Not with
    parameter servers."""
    learning_rate: Number | None = None
    """Step size, such as 0.1. Required with name."""
    momentum: Number | None = None
    """SGD: momentum. Default: none."""
    nesterov: StrictBool = False
    """SGD: Nesterov's momentum. Default: false."""
    weight_decay: Number = 0
    """L2 penalty (SGD, Adam) or decoupled decay (AdamW). Default: 0."""
    beta1: NumberBelow1 | None = None
    """Adam, AdamW: decay of the first moment, below 1. Default: 0.9."""
    beta2: NumberBelow1 | None = None
    """Adam, AdamW: decay of the second moment, below 1. Default: 0.999."""
    epsilon: Number | None = None
    """Adam, AdamW: added to the denominator. Default: 1e-8."""
    groups: OptimizerGroups = ()
    """Parameters with numbers of their own, such as {match: "(bias|norm)", weightDecay: 0}. The first match wins. Default: none."""
