"""The master's side of evaluations between two steps of a training with collectives: the ranks send what they found, all get the course.

The ranks wait for it between two steps, so that all of them take the same decision after the same step. Pure.
"""

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.measured import Measured, combined
from disttrain_trainer.coordinator.job_course import JobCourse
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.messages import Message


class Evaluations(JobCourse):
    """Those of ranks; the course of the training is as they decide it."""

    def __init__(self, *, config: JobConfig, tracker: Tracker) -> None:
        super().__init__(config=config, tracker=tracker)
        self._slices: dict[int, Measured] = {}
        self._of: tuple[int, int, int] | None = None
        """Round, step and number of the slices that are being gathered."""

    def begin(self, course: Course) -> None:
        """The training goes on from a state that has this course."""
        self.course, self._slices, self._of = course.merged(self.course), {}, None
        self._show()

    def know(self, course: Course) -> None:
        """A member of the round that this master has not begun has this course."""
        if course.evaluated > self.course.evaluated or course.roll_backs > self.course.roll_backs:
            self.begin(course)

    def found(self, message: Message) -> bool:
        """A rank evaluated a slice, or the whole. True when the evaluation of the step is complete: `course` is the one after it."""
        step = int(message["step"])
        if step <= self.course.evaluated:
            return False
        of = int(message["generation"]), step, int(message["of"])
        if self._of != of:
            self._slices, self._of = {}, of
        self._slices[int(message["slice"])] = Measured(message["evaluation"], message.get("weights"))
        if len(self._slices) < of[2]:
            return False
        every = [self._slices[number] for number in sorted(self._slices)]
        whole = combined(every) if of[2] > 1 else every[0]
        self.begin(self.course.after(step, whole.numbers, self._config, is_weighted=whole.weights is not None))
        return True
