"""The course of a training as its master knows it: what evaluations and roll-backs decided, and what the progress shows of it. Pure."""

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.messages import Message


class JobCourse:
    """What the masters of both exchanges do alike; when to evaluate is their own."""

    def __init__(self, *, config: JobConfig, tracker: Tracker) -> None:
        self._config = config
        self._tracker = tracker
        self.course = Course()

    @property
    def has_nan_policy(self) -> bool:
        return self._config.trainer.nan_policy is not None

    @property
    def may_roll_back(self) -> bool:
        """Whether a loss that is not finite takes the training back to a checkpoint."""
        return self.course.may_roll_back(self._config)

    def roll_back(self, message: Message, who: str) -> None:
        """A member found that the training is not finite, and goes back."""
        self.course = self.course.without(message["parts"], f"{who} at step {message['step']}")
        self._show()

    def _show(self) -> None:
        self._tracker.course = self.course
        if self.course.evaluation is not None:
            self._tracker.evaluation, self._tracker.evaluation_step = self.course.evaluation, self.course.evaluated
