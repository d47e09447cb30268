"""What the master knows of one member of a training with collectives."""

from dataclasses import dataclass, field

from disttrain.api.runtime import ProgressModel
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.net.members import MemberState
from disttrain_trainer.net.messages import Message


@dataclass(slots=True)
class Place:
    """What is known of a member."""

    state: MemberState
    round_number: int = 0
    step: int = -1
    """The step of the state that it holds, -1 for none."""
    checkpoint: int | None = None
    """Of rank 0, for a sharded model: where a round begins that no state is left for."""
    reforming: bool = False
    """The member received REFORM and has not left its round yet."""
    course: Course = field(default_factory=Course)
    """That of the state that it holds."""
    evaluation: dict[str, float] | None = None
    model: ProgressModel | None = None
    done_at: float = 0.0
    """When its work was done."""
    fit: bool = True
    """What it trains is what the others train."""
    size: int = 0
    """Of an elastic job: how many members its round has."""


def model_of(message: Message) -> ProgressModel | None:
    """The model's file that a message names."""
    model = message.get("model")
    return None if model is None else ProgressModel.model_validate(model)


def course_of(message: Message) -> Course:
    """The course that a message tells."""
    course = message.get("course")
    return Course() if course is None else Course.model_validate(course)
