"""spec.trainer.learningRateSchedule: the learning rate as a function of the step, and the rules between it and the rest of the trainer."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StrictInt

from disttrain.api.base import Model, Rule
from disttrain.api.types import INT32_MAX, Factor, Fraction


class ScheduleType(StrEnum):
    CONSTANT = "Constant"
    LINEAR = "Linear"
    COSINE = "Cosine"
    STEP = "Step"


_DECAYS = (ScheduleType.LINEAR, ScheduleType.COSINE)


class LearningRateSchedule(Model):
    """What multiplies the learning rates of the optimizer in each step; the formula is in the description of the field (trainer.py).

    The same as torch's SequentialLR of LinearLR (the warm-up) and LinearLR, CosineAnnealingLR or StepLR.
    """

    RULES = (
        Rule(
            cel="!has(self.minimumFactor) || self.type in ['Linear', 'Cosine']",
            check=lambda s: s.minimum_factor is None or s.type in _DECAYS,
            message="only with type Linear or Cosine, which decay to it",
            field="minimumFactor",
            shows="type",
        ),
        Rule(
            cel="has(self.stepSize) == (self.type == 'Step')",
            check=lambda s: (s.step_size is not None) == (s.type is ScheduleType.STEP),
            message="set it with type Step, and only then",
            field="stepSize",
            shows="type",
        ),
        Rule(
            cel="!has(self.gamma) || self.type == 'Step'",
            check=lambda s: s.gamma is None or s.type is ScheduleType.STEP,
            message="only with type Step",
            field="gamma",
            shows="type",
        ),
    )
    type: ScheduleType = ScheduleType.CONSTANT
    """Constant, Linear, Cosine or Step. Default: Constant."""
    warmup_steps: Annotated[StrictInt, Field(ge=0, le=INT32_MAX)] = 0
    """Steps in which the rate rises linearly, fewer than the job has. Default: 0."""
    minimum_factor: Factor | None = None
    """Linear, Cosine: what the factor decays to by the end of the job, 0 to 1. Default: 0."""
    step_size: Annotated[StrictInt, Field(ge=1, le=INT32_MAX)] | None = None
    """Step: steps between two decays."""
    gamma: Fraction | None = None
    """Step: what each decay multiplies the rate by, above 0, at most 1. Default: 0.1."""


def rules(*, ours: str) -> tuple[Rule, ...]:
    """The rules of a Trainer. ours: CEL of a job whose optimizer is ours."""
    return (
        Rule(
            cel=f"!has(self.learningRateSchedule) || {ours}",
            check=lambda t: t.learning_rate_schedule is None or t.is_ours,
            message="is for our loop, and for a script with strategy.type ParameterServer; any other brings its own",
            field="learningRateSchedule",
        ),
        Rule(
            cel="!has(self.learningRateSchedule) || !has(self.maxSteps) || self.learningRateSchedule.warmupSteps < self.maxSteps",
            check=lambda t: (
                t.learning_rate_schedule is None
                or t.max_steps is None
                or t.learning_rate_schedule.warmup_steps < t.max_steps
            ),
            message="must be below maxSteps",
            field="learningRateSchedule.warmupSteps",
            shows="learningRateSchedule.warmupSteps",
        ),
    )
