"""Evaluations between two steps of a training with collectives, as one rank takes part in them (docs/design/0020).

All ranks stop after the same step. Where every number of the first evaluation came as (mean, weight), each rank evaluates a slice of the
data set from the second one on; else the first rank evaluates all of it. The master puts the slices together and gives all ranks the
course, by which they go on, or end.
"""

from collections.abc import Callable

from disttrain_trainer.checkpoint import course as courses
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.measured import Measured
from disttrain_trainer.errors import UserError
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.model.evaluation import say
from disttrain_trainer.model.hooks import STOP
from disttrain_trainer.model.task import Task
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.rank import RoundEnded

log = logs.get_logger(__name__)

Measure = Callable[[int, int], Measured]
"""Evaluates one of so many slices."""


class RankEvaluations:
    """Those of one rank in one round. For the training thread."""

    def __init__(
        self,
        *,
        process: Process,
        task: Task,
        loop: TrainingLoop,
        control: ControlClient,
        member: CollectiveMember,
        this_round: Round,
        measure: Measure,
        kept: Callable[[Course], None] | None = None,
        agree: Callable[[bool], bool],
        all_call: bool = False,
    ) -> None:
        """kept: keeps the course with the checkpoint of its step. agree: whether any rank of the round says so; every rank must call it.

        all_call: every rank must call the model together, and finds the same; then there are no slices, and the first rank reports.
        """
        self._config = process.config
        self._loop = loop
        self._control = control
        self._member = member
        self._round = this_round
        self._place, self._size = this_round.place(process.rank), this_round.size(process.config.world_size)
        self._total = task.schedule.total_steps
        self._measure = measure
        self._kept = kept
        self._all_call = all_call
        self._hooks = task.hooks
        self._agree = agree

    def before_step(self, step: int) -> bool:
        """Evaluates the parameters of this step if that is due and not done. False when the training ends here.

        Raises RoundEnded, and what the user's code raises.
        """
        course = self._member.course
        if step > course.evaluated and courses.is_due(self._config, step, total=self._total):
            course = self._evaluate(step)
        return course.stopped is None

    def _evaluate(self, step: int) -> Course:
        member, control = self._member, self._control
        self._loop.before_save(waits=True, reported=False)  # what comes may take long
        of = self._size if member.course.is_weighted and not self._all_call else 1
        if self._place < of or self._all_call:
            measured = self._measure(self._place if of > 1 else 0, of)
            if measured.numbers or of == 1:
                courses.require_metrics(measured.numbers, self._config)
            if self._place < of:
                found = {"evaluation": measured.numbers, "weights": measured.weights}
                with control.changed:
                    member.found = {
                        "generation": self._round.number,
                        "step": step,
                        "slice": self._place,
                        "of": of,
                        **found,
                    }
                control.send(MessageType.EVALUATED, **member.found)
        control.wait(
            lambda: True if member.course.evaluated >= step or member.round is not self._round else None,
            what=f"the evaluation of step {step}",
            timeout=None,  # the user's code may take its time
        )
        if member.course.evaluated < step:
            raise RoundEnded
        with control.changed:
            member.found = None
        if of > 1 and self._place == 0 and member.course.evaluation is not None:
            say(member.course.evaluation)  # no rank has evaluated all of it
        course = self._asked_hooks(member.course)
        if course.stopped is not None:
            log.info("the training ends at step %d: %s", step, course.stopped)
        if self._kept is not None:
            self._kept(course)
        return course

    def _asked_hooks(self, course: Course) -> Course:
        """The course, after every rank has called its hook: it ends the training when one of them says so."""
        if self._hooks is None or course.evaluation is None:
            return course
        if self._agree(self._hooks.evaluated(course.evaluation)) and course.stopped is None:
            course = course.model_copy(update={"stopped": STOP})
            with self._control.changed:
                self._member.course = course
        return course


def require_unchanged(before: list[int], after: list[int]) -> None:
    """Raises UserError when an evaluation has changed the parameters: those of the other ranks would differ.

    before, after: sums over the bits of the parameters.
    """
    if before != after:
        raise UserError(
            "trainer.evaluate changes the parameters of the model, which the training goes on with: evaluate a copy (copy.deepcopy), or "
            "only at the end (evaluateEverySteps: 0)"
        )
