"""What the learning rate is multiplied by for a gradient that a shard applies: the schedule's factor of its step, and its staleness's.

The step is that of the gradient's part: under Sync the version of the shard; with Async and BoundedStaleness every shard applies the
gradient with the same factor, whatever came before it there. So the factor needs no state, and is the same after a promotion or a resume.
"""

from disttrain.api.schedule import LearningRateSchedule
from disttrain.api.strategy import StaleLearningRate
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.learning_rate import LearningRate
from disttrain_trainer.parameter_server.stale_rate import rate_factor


class StepRate:
    """Of one shard. Not thread-safe. A server knows no data set, so that the first worker says how many steps the job has."""

    def __init__(self, schedule: LearningRateSchedule | None, *, stale: StaleLearningRate, parts_per_step: int) -> None:
        self._schedule = schedule
        self._stale = stale
        self._parts_per_step = parts_per_step
        self._learning_rate: LearningRate | None = None

    def know(self, total_steps: int | None) -> None:
        """A worker says how many steps the job has. Raises WrongInput when another one said something else, or it does not say."""
        if self._schedule is None:
            return
        before = self._learning_rate
        if total_steps is None or (before is not None and before.total_steps != total_steps):
            others = "" if before is None else f", and others say {before.total_steps}"
            raise WrongInput(
                f"trainer.learningRateSchedule: a worker says that the job has {total_steps} steps{others}: all workers must have the same "
                "data set, and images of one release"
            )
        self._learning_rate = LearningRate(self._schedule, total_steps)

    def factor(self, index: int, staleness: int) -> float:
        """For the gradient of the part of this number. Raises RuntimeError before `know`."""
        scheduled = 1.0
        if self._schedule is not None:
            if self._learning_rate is None:
                raise RuntimeError("no worker has said how many steps the job has")
            scheduled = self._learning_rate.factor(index // self._parts_per_step)
        return scheduled * rate_factor(self._stale, staleness)
