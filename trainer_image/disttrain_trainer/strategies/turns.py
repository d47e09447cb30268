"""Batches that go from a worker's thread to the script's, and back: where our loop computes a loss, the script does."""

import threading
from dataclasses import dataclass
from typing import Any

import torch

from disttrain_trainer.errors import TrainerError, UserError
from disttrain_trainer.model.named_values import Values

FIRST_STEPS = 3
"""Batches from the first one on of which one must reach a parameter of the model."""


class ScriptOver(TrainerError):
    """The script has ended; never seen outside of the worker's thread."""


@dataclass(slots=True)
class _Step:
    """What the script made of a batch."""

    loss: float | None
    weight: float | None


class Turns:
    """Batches from the worker's thread to the script's, and back what it made of them. Either the one or the other thread runs."""

    def __init__(self) -> None:
        self.values: Values | None = None
        """As of LossOf: a script gives none."""
        self._changed = threading.Condition()
        self._batch: list[Any] = []
        """The batch that the script is to compute, until it takes it."""
        self._computes = self._gone = self._over = False
        self._step: _Step | None = None
        self._error: BaseException | None = None
        self._calls = self._idle = 0
        self.gave_loss = False
        """Whether the script gave a loss of its last batch."""

    # In the worker's thread.

    def __call__(self, batch: Any, samples: int) -> tuple[torch.Tensor, float | None]:
        """As of LossOf. The backward of what it returns reaches nothing: the script has called that of its loss."""
        self._calls += 1
        with self._changed:
            self._batch = [batch]
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._step is not None or self._gone)
            if self._step is None:
                raise ScriptOver
            step, self._step = self._step, None
        self.gave_loss = step.loss is not None
        return torch.tensor(step.loss or 0.0, dtype=torch.float64, requires_grad=True), step.weight

    def learned_nothing(self) -> None:
        """As of LossOf: one batch may have no targets."""
        self._idle += 1
        if self._idle == self._calls == FIRST_STEPS:
            raise UserError(
                f"ps.step() found no gradient in the model of parameter_server(model) in the first {FIRST_STEPS} batches: call "
                "loss.backward() before it, on a loss of this model"
            )

    def end(self, error: BaseException | None) -> None:
        """There is no other batch: the training is done, or failed."""
        with self._changed:
            self._over, self._error = True, error
            self._changed.notify_all()

    # In the script's thread.

    @property
    def over(self) -> bool:
        """Whether there is no other batch."""
        return self._over

    def next(self) -> list[Any]:
        """The next batch, alone in a list; none when the training is done. Raises what ended it."""
        with self._changed:
            if self._computes:
                raise UserError(
                    "the script takes the next batch without ps.step() for the one before: call it once for each batch"
                )
            self._await_turn()
            batch, self._batch = self._batch, []
            self._computes = bool(batch)
            return batch

    def step(self, loss: float | None, weight: float | None) -> None:
        """Gives the batch back, and returns when the servers have its gradient and the next one may be taken."""
        with self._changed:
            self.check()
            self._computes, self._step = False, _Step(loss, weight)
            self._changed.notify_all()
            self._await_turn()

    def check(self) -> None:
        """Raises UserError when there is no batch for a step."""
        if not self._computes:
            raise UserError(
                "ps.step() was called without a batch: call it once for each batch of batches(dataset), after loss.backward()"
            )

    def raise_error(self) -> None:
        """Raises what ended the training, if it failed."""
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """The script has ended."""
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _await_turn(self) -> None:
        self._changed.wait_for(lambda: (self._batch and self._step is None) or self._over)
        self.raise_error()
