"""The user's loss of a batch, checked to be one: a mean, what it weighs, and named values beside it."""

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import unwrap
from typing import Any, Protocol

import torch
from torch import nn

from disttrain_trainer.errors import OwnGroup, UserError
from disttrain_trainer.model.factories import place_of
from disttrain_trainer.model.loss_weight import weight_of
from disttrain_trainer.model.named_values import NamedValues, Values
from disttrain_trainer.runtime import logs, machine
from disttrain_trainer.runtime.termination import of_user_error

log = logs.get_logger(__name__)

Loss = Callable[[nn.Module, Any], Any]
"""Returns the mean loss of a batch, or (mean, weight); and last, if it likes, named values."""
MOST_WEIGHTLESS = 50
"""Losses from the first one on that may have the weight 0: batches without targets."""
IDLE_STEPS = 3
"""Losses from the first one on that may teach nothing."""


class LossOf(Protocol):
    """What the loop computes of a batch."""

    values: Values | None
    """Named values of the batch that was computed last, each a mean that weighs what the loss weighs; None where there are none."""

    def __call__(self, batch: Any, samples: int) -> tuple[torch.Tensor, float | None]:
        """The mean loss of so many samples, a scalar, and its weight; None: the number of samples. Raises UserError."""

    def learned_nothing(self) -> None:
        """After a backward that reached no parameter. Raises UserError when none of the first ones did."""


class Objective:
    """The user's loss of a batch, checked to be one."""

    def __init__(self, model: nn.Module, loss: Loss, *, reads_weights: bool = True) -> None:
        """reads_weights: a loss that returns its mean alone counts by what its graph says that it is the mean of. Without effect, and so
        left out, where nothing is added up: a batch is one part."""
        self.values: Values | None = None
        self._model = model
        self._loss = loss
        self._named = NamedValues(place_of(loss))
        self._reads_weights = reads_weights
        self._calls = self._idle = self._weightless = 0
        self._warned = False
        self._kinds = set[bool]()
        """Whether a weight was read, of the losses that count by something else than samples, and of those whose graph says nothing."""

    def __call__(self, batch: Any, samples: int) -> tuple[torch.Tensor, float | None]:
        """The mean loss of a batch of so many samples, a scalar with a graph; and the weight of that mean, which the loss returns, or its
        graph says. None: the samples.

        A mean of weight 0 may be anything: it counts for nothing. Sets `values`. Raises UserError.
        """
        self._calls += 1
        self.values = None
        try:
            loss, weight = self._of_user(batch), None
        except OwnGroup as error:
            raise error.by("trainer.model" if unwrap(self._loss) is cross_entropy else "trainer.loss") from None
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"trainer.batchSize: BatchNorm cannot train on the one sample of a worker's part: {error}; give each worker two or more "
                "(each portion, with gradientAccumulationSteps), or use another normalization in trainer.model "
                f"({of_user_error(error)[1].where})"
            ) from None
        if isinstance(loss, tuple | list):
            loss, weight = self._split(loss)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
            raise UserError(
                f"trainer.loss returned a {type(loss).__name__}{shape}; expected the batch's mean loss, a scalar tensor, "
                f"(mean, weight) or (mean, weight, {{name: value}}){place_of(self._loss)}"
            )
        if weight is not None:
            self._look_at(weight)
        elif self._reads_weights:
            weight = self._read(loss, samples)
        if weight == 0:
            return loss, weight
        if not loss.requires_grad:
            raise UserError(
                "trainer.loss returned a loss that no parameter of trainer.model can learn from: it was computed without autograd, as "
                f"after detach(), item() or numpy(), or under torch.no_grad(){place_of(self._loss)}"
            )
        if loss.is_complex():
            raise UserError(f"trainer.loss returned a {loss.dtype}; expected a real number{place_of(self._loss)}")
        return loss, weight

    def _read(self, loss: torch.Tensor, samples: int) -> float | None:
        """What the graph says that the mean is over; None: samples, or it does not say. Raises UserError when none has counted."""
        weight = weight_of(loss)
        if weight == samples:
            return None
        self._weightless += weight == 0
        if self._weightless == self._calls == MOST_WEIGHTLESS:
            raise UserError(
                f"trainer.loss divided by 0 in each of its first {MOST_WEIGHTLESS} calls, so that nothing was trained: its mask leaves "
                f"nothing, or every target is ignored{place_of(self._loss)}"
            )
        self._kinds.add(weight is not None)
        if len(self._kinds) == 2 and not self._warned:
            self._warned = True
            log.warning(
                "trainer.loss is a mean over something else than samples, such as tokens, in some batches, and a sum of several terms, or "
                "of another form, in others, which count by their samples: return (mean, weight)%s",
                place_of(self._loss),
            )
        return weight

    def _of_user(self, batch: Any) -> Any:
        try:
            found = self._loss(self._model, batch)
        except BaseException as error:
            machine.leave_forked_child(error)
            raise
        machine.leave_forked_child()
        return found

    def _look_at(self, weight: float) -> None:
        """Whether the second value is a weight at all, and not an accuracy or another figure. Raises UserError when none has counted."""
        self._weightless += weight == 0
        if self._weightless == self._calls == MOST_WEIGHTLESS:
            raise UserError(
                f"trainer.loss returned (mean, 0) in each of its first {MOST_WEIGHTLESS} calls, so that nothing was trained: the second "
                f"value is the weight of the mean, such as a number of tokens; return the mean alone{place_of(self._loss)}"
            )
        if not self._warned and (0 < weight < 1 or self._weightless == self._calls == IDLE_STEPS):
            self._warned = True
            log.warning(
                "trainer.loss returned (mean, %g): the second value is taken as the weight of the mean, such as a number of tokens; if it "
                "is another figure, return the mean alone%s",
                weight,
                place_of(self._loss),
            )

    def learned_nothing(self) -> None:
        """After a backward that reached no parameter. Raises UserError when none of the first ones did: one batch may have no targets."""
        self._idle += 1
        if self._idle == self._calls == IDLE_STEPS:
            raise UserError(
                f"trainer.loss returned a loss whose graph reaches no parameter of trainer.model, {IDLE_STEPS} times in a row: it is of "
                f"another model, or requires_grad was set after detach(){place_of(self._loss)}"
            )

    def _split(self, returned: Sequence[Any]) -> tuple[Any, float | None]:
        """(mean, weight), (mean, weight, values) or (mean, values); a weight of None says that the loss does not give one."""
        rest = list(returned[1:])
        if rest and isinstance(rest[-1], Mapping):
            self.values = self._named.take(rest.pop()) or None
        if len(returned) < 2 or len(rest) > 1:
            raise UserError(
                f"trainer.loss returned {len(returned)} values; expected the batch's mean loss, (mean, weight), such as the number of "
                f"tokens that it is the mean of, or (mean, weight, {{name: value}}){place_of(self._loss)}"
            )
        if not rest or rest[0] is None:
            return returned[0], None
        given = rest[0]
        try:
            weight = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError, RuntimeError):
            weight = math.nan
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(
                f"trainer.loss returned the weight {given!r:.100}; expected a number of 0 or more, such as the number of tokens that the "
                f"loss is the mean of{place_of(self._loss)}"
            )
        return returned[0], weight


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss where the job names none: cross entropy of (input, target). Raises UserError for data that it does not fit."""
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, list | tuple | dict) else ""
        raise UserError(
            "trainer.loss is not set, which means cross entropy of (input, target), but a batch of trainer.dataset is a "
            f"{type(batch).__name__}{count}: set trainer.loss"
        )
    inputs, targets = batch
    outputs = model(inputs)
    try:
        return nn.functional.cross_entropy(outputs, targets)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        what = [
            f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            for x in (outputs, targets)
        ]
        raise UserError(
            f"trainer.loss is not set, and cross entropy of what the model gives ({what[0]}) and the targets ({what[1]}) "
            f"fails: {error}: set trainer.loss"
        ) from None
