"""The named values that a loss returns beside its mean: which ones are taken."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from disttrain.api.values import LONGEST_NAME, MOST_VALUES, NAME
from disttrain_trainer.errors import UserError

Values = Mapping[str, torch.Tensor | float]
"""By name: a number, or a tensor of one element without a graph, which may still be computed on its device."""


class NamedValues:
    """Checks what the loss of one process returns."""

    def __init__(self, place: str) -> None:
        """place: of the user's loss, to stand at the end of a message."""
        self._place = place
        self._known: set[str] = set()

    def take(self, given: Mapping[Any, Any]) -> Values:
        """The values, without their graphs. Raises UserError, which names the one that is wrong. Does not wait for a device."""
        for name in given.keys() - self._known:
            self._learn(name)
        return {name: self._number(name, value) for name, value in given.items()}

    def _learn(self, name: Any) -> None:
        if not (isinstance(name, str) and re.fullmatch(NAME, name)):
            raise UserError(
                f"trainer.loss returned a value named {name!r:.100}; expected a name of 1 to {LONGEST_NAME} letters, digits, blanks and "
                f"_ - . : / @ + ( ) %{self._place}"
            )
        if len(self._known) == MOST_VALUES:
            raise UserError(
                f"trainer.loss returned values of more than {MOST_VALUES} names; the last is {name!r}: leave some out{self._place}"
            )
        self._known.add(name)

    def _number(self, name: str, value: Any) -> torch.Tensor | float:
        if isinstance(value, torch.Tensor):
            # A DTensor is gathered here, where every rank of its mesh comes by; one of them reports.
            whole: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
            if whole.numel() == 1 and not whole.is_complex():
                return whole.detach()
            what = f"a {whole.dtype} tensor of shape {tuple(whole.shape)}"
        else:
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                what = f"{value!r:.100}"
        raise UserError(
            f"trainer.loss returned the value {name!r} as {what}; expected a number, such as the mean of the batch{self._place}"
        )
