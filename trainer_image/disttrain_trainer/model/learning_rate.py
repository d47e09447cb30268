"""The learning rate of a step: trainer.learningRateSchedule. Pure.

The factor of a step is a function of the settings, the number of steps before it and the number of steps of the job. Nothing is kept from
step to step, so that a rank, a parameter server and a process that goes on from a checkpoint compute the same.
"""

import math
from dataclasses import dataclass

from disttrain.api.schedule import LearningRateSchedule, ScheduleType
from disttrain_trainer.errors import WrongInput

DEFAULT_GAMMA = 0.1
"""That of torch.optim.lr_scheduler.StepLR."""


@dataclass(frozen=True, slots=True)
class LearningRate:
    """What the learning rates of the optimizer are multiplied by in each step of a job."""

    schedule: LearningRateSchedule | None
    total_steps: int

    def __post_init__(self) -> None:
        """Raises WrongInput where the warm-up has no end within the job."""
        warmup_steps = self.schedule.warmup_steps if self.schedule is not None else 0
        if warmup_steps >= self.total_steps:
            raise WrongInput(
                f"trainer.learningRateSchedule.warmupSteps: the job has {self.total_steps} steps, and the warm-up is to end before the "
                f"last one (got {warmup_steps})"
            )

    def factor(self, step: int) -> float:
        """The factor for the step that `step` steps were taken before, from 0 on.

        As torch's SequentialLR: LinearLR(start_factor=1 / (W + 1), total_iters=W) for the W steps of the warm-up, then LinearLR,
        CosineAnnealingLR or StepLR over the other steps. After the last step of the job the factor stays what it is at the end.
        """
        schedule = self.schedule
        if schedule is None:
            return 1.0
        warmup_steps = schedule.warmup_steps
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        decayed = step - warmup_steps
        share = min(1.0, decayed / (self.total_steps - warmup_steps))
        least = schedule.minimum_factor or 0.0
        match schedule.type:
            case ScheduleType.CONSTANT:
                return 1.0
            case ScheduleType.LINEAR:
                return 1.0 - (1.0 - least) * share
            case ScheduleType.COSINE:
                return least + (1.0 - least) * (1.0 + math.cos(math.pi * share)) / 2.0
            case ScheduleType.STEP:
                gamma = schedule.gamma if schedule.gamma is not None else DEFAULT_GAMMA
                return gamma ** (decayed // (schedule.step_size or 1))
