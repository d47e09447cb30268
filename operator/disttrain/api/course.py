"""What decides the course of a training beside its steps: evaluations, the checkpoint that is kept, the early end, roll-backs.

Fields of trainer and checkpoint, and the rules between them. What the trainer remembers of it is checkpoint/course.py.
"""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, StrictInt, StringConstraints

from disttrain.api.base import Model, Rule

Metric = Annotated[str, StringConstraints(min_length=1, max_length=253)]


class Mode(StrEnum):
    """Which of two values of a metric is the better one."""

    MAX = "Max"
    MIN = "Min"


class KeepBest(Model):
    """The checkpoint that is kept beside the newest ones."""

    metric: Metric
    """Name of a number that trainer.evaluate returns."""
    mode: Mode
    """Max: the largest value is the best; Min: the smallest."""


class EarlyStopping(KeepBest):
    """The end of a training that does not improve any more."""

    patience: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = 3
    """Evaluations in a row without a better value, after which the job is complete. Default: 3."""


class NanPolicy(Model):
    """What a loss that is NaN or infinite does."""

    roll_backs: Annotated[StrictInt, Field(ge=0, le=1000)] = 0
    """How often the training goes back to the newest checkpoint, and leaves out the parts of the failing step, before the job fails.
    Default: 0."""


def _of_trainer(trainer: Any) -> bool:
    return bool(trainer.evaluate_every_steps or trainer.early_stopping or trainer.nan_policy or trainer.hooks)


TRAINER_RULES = (
    Rule(
        cel="has(self.model) || (self.evaluateEverySteps == 0 && !has(self.earlyStopping) && !has(self.nanPolicy) && !has(self.hooks))",
        check=lambda t: t.model is not None or not _of_trainer(t),
        message="evaluateEverySteps, earlyStopping, nanPolicy and hooks are for our loop (model and dataset)",
    ),
    Rule(
        cel="!has(self.model) || self.evaluateEverySteps <= 0 || has(self.evaluate)",
        check=lambda t: t.model is None or not t.evaluate_every_steps or t.evaluate is not None,
        message="needs trainer.evaluate",
        field="evaluateEverySteps",
        shows="evaluateEverySteps",
    ),
    Rule(
        cel="!has(self.model) || !has(self.earlyStopping) || self.evaluateEverySteps > 0",
        check=lambda t: t.model is None or t.early_stopping is None or t.evaluate_every_steps > 0,
        message="needs trainer.evaluateEverySteps, such as 100",
        field="earlyStopping",
    ),
)
"""What must hold between the fields of trainer."""

SPEC_RULES = (
    Rule(
        cel="!has(self.checkpoint) || !has(self.checkpoint.keepBest) || self.trainer.evaluateEverySteps <= 0 || "
        "self.checkpoint.everySteps % self.trainer.evaluateEverySteps == 0",
        check=lambda s: (
            s.checkpoint is None
            or s.checkpoint.keep_best is None
            or s.trainer.evaluate_every_steps <= 0
            or s.checkpoint.every_steps % s.trainer.evaluate_every_steps == 0
        ),
        message="with keepBest it must be a multiple of trainer.evaluateEverySteps, so that each checkpoint is evaluated",
        field="checkpoint.everySteps",
        shows="checkpoint.everySteps",
    ),
    Rule(
        cel="!has(self.checkpoint) || !has(self.checkpoint.keepBest) || self.trainer.evaluateEverySteps != 0",
        check=lambda s: s.checkpoint is None or s.checkpoint.keep_best is None or s.trainer.evaluate_every_steps != 0,
        message="needs trainer.evaluateEverySteps, such as checkpoint.everySteps",
        field="checkpoint.keepBest",
    ),
)
"""What must hold between trainer and checkpoint."""
