"""Members of a job, and the interfaces between a coordinator and the rest of the master. No sockets here."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from disttrain.api.names import Role
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.net.messages import Message, MessageType

T = TypeVar("T")

Answer: TypeAlias = Callable[[T, float], None]
"""Called with the result of a request, and the time."""


class Member(NamedTuple):
    """A role and a rank: a place in the job, whichever process fills it at the moment."""

    role: Role
    rank: int

    def __str__(self) -> str:
        return f"{self.role.value}-{self.rank}"


class Sender(Protocol):
    """Sends a coordinator's messages."""

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        """Sends, if the member is connected; never blocks."""


class CheckpointStore(Protocol):
    """The checkpoint folder, as a coordinator of parameter servers uses it. No call blocks: `answer` is called later.

    Requests are carried out one after the other, in the order of the calls, so that no removal overlaps with a search.
    """

    def find(self, answer: Answer[Manifest | None]) -> None:
        """Looks for the newest valid checkpoint."""

    def prepare(self, step: int, answer: Answer[str | OSError]) -> None:
        """Makes the folder of a step ready; the answer is its name."""

    def publish(
        self, *, step: int, parts: int, files: dict[str, str], finished: bool, answer: Answer[Manifest | OSError]
    ) -> None:
        """Completes the step's checkpoint by its manifest."""

    def amend(self, course: Course) -> None:
        """Keeps the course with the checkpoint of its step, and those after it."""


class Coordinator(Protocol):
    """The decisions of one strategy. Every method is called by one thread, with the time in seconds of a monotonic clock."""

    def joined(self, member: Member, hello: Message, now: float) -> None:
        """A process was admitted."""

    def on_message(self, member: Member, message: Message, now: float) -> None:
        """A message of an admitted process, other than a heartbeat."""

    def reported(self, rank: int, message: Message, now: float) -> None:
        """A user's script made progress."""

    def lost(self, member: Member, now: float) -> None:
        """Its connection ended, or it was silent for too long."""

    def tick(self, now: float) -> None:
        """Time has passed, a few seconds at most."""

    def terminate(self, now: float) -> None:
        """The master received SIGTERM."""

    def waiting_for(self, now: float) -> str | None:
        """The members or the checkpoint that the job waits for, as text; None while it trains."""

    @property
    def ended(self) -> bool:
        """Whether FINISH was sent to every process."""

    @property
    def released(self) -> bool:
        """After `terminate`: everything is saved that could be."""
