"""What the master knows of a training process, and told it: the part of a role that the control thread may touch.

Apart from the roles, so that a process can say hello before it imports torch.
"""

from collections import deque
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Protocol

from disttrain.api.runtime import ProgressModel
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.messages import Message, MessageType


class MemberState(StrEnum):
    """What a member does."""

    STARTING = "starting"
    """It imports, builds its model, loads its data."""
    READY = "ready"
    """It waits for a world."""
    RUNNING = "running"
    """It is in a world."""
    DONE = "done"
    """It did all its work and waits for the others: one of them may still be lost and need it again."""


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """One stay in a round: another object for each, also within the same round."""

    number: int
    lease: str = ""
    """Names a worker's stay with parameter servers: what is said of an earlier one must not count."""
    source: int = 0
    """A collective world's rank with the newest state."""
    buffers: str | None = None
    """The newest checkpoint's file of a worker's buffers, from the checkpoint folder on."""
    from_scratch: bool = False
    """There is no checkpoint: the round began from the first parameters."""


@dataclass(frozen=True, slots=True)
class Save:
    """A checkpoint that waits for a worker's buffers."""

    id: str
    folder: str


class Group(Protocol):
    """The connections of a rank to the others, as another thread than the rank's may use them."""

    def end(self) -> None: ...


class CollectiveMember:
    """A member of a collective world: a rank of our loop, or the agent of a script."""

    def __init__(self) -> None:
        self.state = MemberState.STARTING
        self.step = -1
        """Steps in the state that this rank holds; -1 for none."""
        self.data: DataSet | None = None
        self.layout: str | None = None
        """The data set, and a digest of the state's layout, once they are known. A script's agent knows neither."""
        self.round: Round | None = None
        self.save_asked = False
        self.blamed = False
        """The master says that this member's failure is the root cause."""
        self.evaluation: dict[str, float] | None = None
        self.model: ProgressModel | None = None
        """The file of the trained model, once this rank has written it."""
        self.group: Group | None = None
        """The connections to the other ranks, in which the main thread may wait."""
        self._round_number = 0

    def describe(self) -> Message:
        """What a new master needs to know."""
        fields: Message = {"state": self.state, "generation": self._round_number, "step": self.step} | self._task()
        return fields | self._result()

    def on_message(self, message: Message) -> None:
        match message["type"]:
            case MessageType.ROUND:
                self._round_number = int(message["generation"])
                self.round = Round(self._round_number, source=int(message["source"]))
                self.state, self.save_asked, self.blamed = MemberState.RUNNING, False, False
            case MessageType.REFORM:
                self.round = None
                if self.group is not None:
                    self.group.end()
            case MessageType.SAVE:
                self.save_asked = True
            case MessageType.FAILED:
                self.blamed = True

    def get_ready(self, control: ControlClient) -> None:
        """Leaves the world, and says so."""
        with control.changed:
            self.state, self.round = MemberState.READY, None
        control.send(MessageType.READY, step=self.step, **self._task())

    def _task(self) -> Message:
        return {} if self.data is None else {**asdict(self.data), "layout": self.layout}

    def _result(self) -> Message:
        evaluation = {"evaluation": self.evaluation} if self.evaluation else {}
        return evaluation | ({"model": self.model.to_dict()} if self.model else {})

    def get_done(self, control: ControlClient) -> None:
        """All its work is done; says so."""
        with control.changed:
            self.state = MemberState.DONE
        control.send(MessageType.DONE, **self._result())

    def await_round(self, control: ControlClient, *, timeout: float) -> Round | None:
        """The next world; None when the job is done."""
        found = control.wait(
            lambda: "finished" if control.finished else self.round,
            what="the other workers and the master",
            timeout=timeout,
        )
        return found if isinstance(found, Round) else None

    def await_end(self, control: ControlClient, this_round: Round) -> bool:
        """Waits until everybody is done: True. False when somebody was lost before, and the world is over."""
        control.wait(
            lambda: True if control.finished or self.round is not this_round else None,
            what="the others to finish",
            timeout=None,  # one of them evaluates and saves, and its code may take its time
        )
        return control.finished


class Client(Protocol):
    """A worker's connections to the servers, as another thread than the worker's may use them."""

    def close(self, *, goodbye: bool = True) -> None: ...
    @property
    def bytes_sent(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...


class ParameterServerMember:
    """A worker of parameter servers. Changed with `control.changed` held."""

    def __init__(self) -> None:
        self.data: DataSet | None = None
        """The data set, once it is known: then the worker is ready."""
        self.buffers = False
        """The model has buffers: a checkpoint needs those of one worker."""
        self.keeps_model = False
        """This worker has a place for the trained model."""
        self.save: Save | None = None
        self.round: Round | None = None
        self.assignments: deque[int] = deque()
        self.asked = False
        """A TAKE is not answered yet."""
        self.evaluate = False
        self.client: Client | None = None
        """The connections to the servers, in which the main thread may wait."""

    def describe(self) -> Message:
        """What a new master needs to know."""
        data = asdict(self.data) if self.data else {}
        return {**data, "buffers": self.buffers, "keeps_model": self.keeps_model}

    def on_message(self, message: Message) -> None:
        match message["type"]:
            case MessageType.ROUND:
                self._enter(
                    Round(
                        int(message["generation"]),
                        lease=message["stay"],
                        buffers=message["buffers"],
                        from_scratch=bool(message["anew"]),
                    )
                )
            case MessageType.REFORM:
                self._enter(None)
            case MessageType.FINISH:
                self.round = None  # the main thread is idle, and says goodbye to the servers itself
            case MessageType.ASSIGN if self.round is not None and self.round.lease == message["stay"]:
                self.assignments.extend(message["slices"])
                self.asked = False
            case MessageType.EVALUATE:
                self.evaluate = True
            case MessageType.SAVE:
                self.save = Save(str(message["id"]), str(message["folder"]))

    def _enter(self, this_round: Round | None) -> None:
        self.round = this_round
        self.assignments.clear()
        self.asked = self.evaluate = False
        if self.client is not None:
            self.client.close(goodbye=False)
