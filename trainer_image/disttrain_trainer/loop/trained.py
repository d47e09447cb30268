"""What the loop asks of the model that it trains, however its parameters are kept."""

from typing import Protocol


class Trained(Protocol):
    """The parameters and gradients of one process. FlatModel holds whole ones, ShardedModel a part."""

    def zero_grad(self) -> None:
        """Before each step: no gradient is left of the one before."""

    def verify(self) -> None:
        """Raises UserError when the module has other parameters than at the start."""

    def refuse_unfrozen(self) -> None:
        """Raises UserError when a parameter that was frozen at the start requires a gradient now."""

    def refuse_own_backward(self) -> None:
        """Raises UserError when a parameter has a gradient before the loop's own backward."""
