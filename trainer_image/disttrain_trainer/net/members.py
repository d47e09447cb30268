"""The state of a training process that the master knows, or has set by its messages: the control thread changes it.

Apart from the roles, which import torch: a process can send HELLO before.
"""

from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Protocol

from disttrain.api.runtime import ProgressModel
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.messages import Message, MessageType

WORK_AHEAD_SECONDS = 0.25
"""Seconds of work that a worker has assigned: enough to hide the master's latency, and little to compute again when the worker is lost."""
MAX_ASSIGNED_PARTS = 4096


class MemberState(StrEnum):
    """What a member does."""

    STARTING = "starting"
    """It imports, builds its model, loads its data."""
    READY = "ready"
    """It waits for a round."""
    RUNNING = "running"
    """It is in a round."""
    DONE = "done"
    """It did all its work and waits for the others: when one of them is lost, it takes part in another round."""


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """A member's participation in a round, compared by identity: a member that leaves a round and comes back gets another object."""

    number: int
    lease: str = ""
    """Fencing token of a worker of parameter servers: messages that carry an earlier one are ignored."""
    source: int = 0
    """With collectives: the rank whose state is the newest."""
    step: int = -1
    """Of a sharded model: the step at which the round begins; -1 where it is not known beforehand."""
    holders: frozenset[int] = frozenset()
    """The ranks whose state is of that step; none: it is the checkpoint's."""
    buffers: str | None = None
    """The newest checkpoint's file of a worker's buffers, from the checkpoint folder on."""
    from_scratch: bool = False
    """There is no checkpoint: the round began from the initial parameters."""
    members: tuple[int, ...] = ()
    """Of an elastic job: the numbers of those that take part, ascending. None: all that the job has."""

    def place(self, number: int) -> int:
        """The rank of a member in this round. number: the member's own, which stays the same from round to round."""
        return self.members.index(number) if self.members else number

    def size(self, everyone: int) -> int:
        """How many take part. everyone: all that a job has that is not elastic."""
        return len(self.members) or everyone

    primaries: tuple[int, ...] = ()
    """The parameter server that serves each shard; none: each its own."""
    servers: tuple[str, ...] = ()
    """The incarnations of the primaries."""

    def is_same(self, other: "Round") -> bool:
        """Whether two leases are of one round. A round's number comes again when the master and all servers are new: no master has two of
        one number, and no server process is in two."""
        masters = {each.lease.rpartition(".")[0] for each in (self, other)}
        is_known = len(masters) == 1 or not frozenset(self.servers).isdisjoint(other.servers)
        return is_known and self.number == other.number


@dataclass(frozen=True, slots=True)
class Save:
    """A checkpoint that waits for a worker's buffers."""

    id: str
    folder: str


@dataclass(frozen=True, slots=True)
class Hedge:
    """The master's answer to a free worker."""

    part: int | None
    """To be computed once more; None: nothing to hedge."""


class Group(Protocol):
    """The connections of a rank to the others, for threads other than the rank's."""

    def end(self) -> None:
        """Ends every wait of the rank in them. Does not block."""


class CollectiveMember:
    """A member of a round with collectives: a rank of our loop, or the agent of a script."""

    def __init__(self) -> None:
        self.state = MemberState.STARTING
        self.step = -1
        """Steps in the state that this rank holds; -1 for none."""
        self.checkpoint: int | None = None
        """The step where a sharded model begins that no ranks hold: rank 0 says so."""
        self.data: DataSet | None = None
        self.layout: str | None = None
        """The data set, and a digest of the state's layout, once they are known. A script's agent knows neither."""
        self.repeats_data = False
        """The data set is a stream without a state: after a restart its samples are trained at least once."""
        self.round: Round | None = None
        self.begun: Round | None = None
        """The round that began since this member was ready, also when it is over: the main thread may see it only then, and the master
        waits until the member is ready again."""
        self.nan: Message | None = None
        """What this rank says of a loss that is not finite, while it waits for the answer: a new master must hear of it."""
        self.rolled_back = False
        """The loss was not finite: the state that this rank holds does not count any more."""
        self.save_asked = False
        self.resize_asked = False
        """The round is to end after the step in work: members of an elastic job join or leave."""
        self.blamed = False
        """The master decided that this member's failure is the root cause."""
        self.ended_before: list[str] = []
        """Members that had done all their work by then."""
        self.course = Course()
        """The course of the training, with which the state of this rank goes on."""
        self.found: Message | None = None
        """What this rank found in the evaluation that all wait for: a new master must hear of it."""
        self.evaluation: dict[str, float] | None = None
        self.model: ProgressModel | None = None
        """The file of the trained model, once this rank has written it."""
        self.group: Group | None = None
        """The connections to the other ranks, in which the main thread may wait."""
        self._round_number = self._round_size = 0

    def describe(self) -> Message:
        """The fields of HELLO that tell a new master this member's state."""
        fields: Message = {"state": self.state, "generation": self._round_number, **self._held()} | self._task()
        if self._round_size:
            fields["members"] = self._round_size
        if self.found is not None:
            fields["found"] = self.found
        if self.nan is not None:
            fields["nan"] = self.nan
        return fields | self._result()

    def on_message(self, message: Message) -> None:
        """Handles a message of the master. Called by the control thread, with `control.changed` held; does not block."""
        match message["type"]:
            case MessageType.ROUND:
                self._round_number = int(message["generation"])
                self.round = self.begun = Round(
                    self._round_number,
                    source=int(message["source"]),
                    step=int(message.get("step", -1)),
                    holders=frozenset(message.get("holders", ())),
                    members=tuple(message.get("members", ())),
                )
                self._round_size = len(self.round.members)
                self._take_course(message)
                self.found = self.nan = None
                self.state, self.save_asked, self.blamed = MemberState.RUNNING, False, False
                self.resize_asked = False
            case MessageType.COURSE:
                self._take_course(message)
            case MessageType.REFORM:
                self.round = self.nan = None
                if message.get("roll_back"):
                    self.rolled_back = True
                    self._take_course(message)
                if self.group is not None:
                    self.group.end()
            case MessageType.SAVE:
                self.save_asked = True
            case MessageType.RESIZE:
                self.resize_asked = True
            case MessageType.FAILED:
                self.blamed, self.ended_before = True, message.get("ended", [])

    def get_ready(self, control: ControlClient) -> None:
        """Leaves the round, and tells the master."""
        with control.changed:
            self.state, self.round, self.begun = MemberState.READY, None, None
            left = self._round_number
        control.send(MessageType.READY, generation=left, **self._held(), **self._task())

    def _held(self) -> Message:
        held: Message = {"step": self.step}
        if self.checkpoint is not None:
            held["checkpoint"] = self.checkpoint
        return held | course_field(self.course)

    def _take_course(self, message: Message) -> None:
        if "course" in message:
            self.course = Course.model_validate(message["course"])

    def _task(self) -> Message:
        if self.data is None:
            return {}
        repeats = {"repeats_data": True} if self.repeats_data else {}
        return {**asdict(self.data), "layout": self.layout, **repeats}

    def _result(self) -> Message:
        evaluation = {"evaluation": self.evaluation} if self.evaluation else {}
        return evaluation | ({"model": self.model.to_dict()} if self.model else {})

    def get_done(self, control: ControlClient) -> None:
        """All its work is done: tells the master."""
        with control.changed:
            self.state = MemberState.DONE
        control.send(MessageType.DONE, **self._result(), **course_field(self.course))

    def await_round(self, control: ControlClient, *, timeout: float) -> Round | None:
        """Blocks until the next round, which may be over already; None when the job is done."""
        found = control.wait(
            lambda: "finished" if control.finished else self.begun,
            what="the other workers and the master",
            timeout=timeout,
        )
        return found if isinstance(found, Round) else None

    def await_end(self, control: ControlClient, this_round: Round) -> bool:
        """Blocks until every member is done: True. False when a member was lost before and the round is over."""
        control.wait(
            lambda: True if control.finished or self.round is not this_round else None,
            what="the others to finish",
            timeout=None,  # one of them evaluates and saves, and its code may take its time
        )
        return control.finished


def course_field(course: Course) -> Message:
    """The field of a message that tells the course; none while nothing has happened beside steps."""
    return {} if course == Course() else {"course": course.model_dump()}


class Client(Protocol):
    """A worker's connections to the servers, for threads other than the worker's."""

    def close(self, *, goodbye: bool = True) -> None:
        """Closes them; the worker's call that waits raises. goodbye: on purpose, so that no server reports the worker as lost."""

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
        self.begun: Round | None = None
        """As that of CollectiveMember."""
        self.assignments: deque[int] = deque()
        self.in_work: int | None = None
        """The part that the main thread took last, until every server has it: also after its round, while its gradient is kept."""
        self._entered: Round | None = None
        """The newest round: that of these parts."""
        self.ahead = 0
        """Parts beyond the one in work that its loader processes can have in work: it has as many assigned."""
        self.asked = False
        """A REQUEST is not answered yet."""
        self.hedge: Hedge | None = None
        """The master's answer to a worker that is free."""
        self.abandoned: set[int] = set()
        """Parts that another worker has done meanwhile."""
        self.evaluate = False
        """The final parameters are to be evaluated."""
        self.last_step: int | None = None
        """Of these, where the training ends before its last step."""
        self.between: int | None = None
        """The step whose parameters are to be evaluated while the training goes on."""
        self.course = Course()
        self.course_round = 0
        """The round in which the master told the course."""
        self.client: Client | None = None
        """The connections to the servers, in which the main thread may wait."""

    def describe(self) -> Message:
        """The fields of HELLO that tell a new master this member's state."""
        data = asdict(self.data) if self.data else {}
        known = {"generation": self.course_round, **course} if (course := course_field(self.course)) else {}
        return {**data, "buffers": self.buffers, "keeps_model": self.keeps_model, **known, **self._begun()}

    def _begun(self) -> Message:
        """The field of HELLO and READY that names the parts which this worker may have begun, in its order. A worker that connects to a
        new master may still compute and push the parts that the old one assigned."""
        parts = [*([] if self.in_work is None else [self.in_work]), *self.assignments]
        if self._entered is None or not parts:
            return {}
        entered = self._entered
        round_fields = {"generation": entered.number, "stay": entered.lease, "servers": list(entered.servers)}
        return {"begun": {**round_fields, "slices": parts}}

    def get_ready(self, control: ControlClient) -> None:
        """Tells the master, unless this member is in a round."""
        with control.changed:
            if self.round is not None:
                return
            self.begun = None
            state = self.describe()
        control.send(MessageType.READY, **state)

    def await_round(self, control: ControlClient, *, timeout: float) -> Round | None:
        """As that of CollectiveMember."""
        found = control.wait(
            lambda: "finished" if control.finished else self.begun,
            what="the parameter servers and the master",
            timeout=timeout,
        )
        return found if isinstance(found, Round) else None

    def parts_to_request(self, seconds: float) -> int:
        """How many parts to request now: what half-used assignments lack, 0 while a request is open. seconds: of a part; 0: not known."""
        fewest = max(2, 2 * self.ahead)  # it requests when half of them are left
        wanted = min(MAX_ASSIGNED_PARTS, max(fewest, int(WORK_AHEAD_SECONDS / seconds))) if seconds else fewest
        missing = wanted - len(self.assignments)
        return missing if 2 * missing >= wanted and not self.asked else 0

    def on_message(self, message: Message) -> None:
        """Handles a message of the master. Called by the control thread, with `control.changed` held; does not block."""
        match message["type"]:
            case MessageType.ROUND:
                self._enter(
                    Round(
                        int(message["generation"]),
                        lease=message["stay"],
                        buffers=message["buffers"],
                        from_scratch=bool(message["anew"]),
                        primaries=tuple(message.get("primaries", ())),
                        servers=tuple(message.get("servers", ())),
                    )
                )
                self._take_course(message.get("course", {}))
            case MessageType.COURSE:
                self._take_course(message["course"])
            case MessageType.REFORM:
                self._enter(None)
            case MessageType.FINISH:
                self.round = None  # the main thread is idle, and says goodbye to the servers itself
            case MessageType.ASSIGN if self.round is not None and self.round.lease == message["stay"]:
                self.assignments.extend(message["slices"])
                self.asked = False
            case MessageType.HEDGE if self.round is not None and self.round.lease == message["stay"]:
                self.hedge = Hedge(message["part"])
            case MessageType.MOVED if self.round is not None and self.round.lease == message["stay"]:
                for part in message["slices"]:
                    with suppress(ValueError, IndexError):  # it is begun: the main thread has taken it, or takes it now
                        self.assignments.remove(part)
            case MessageType.ABANDON if self.round is not None and self.round.lease == message["stay"]:
                self.abandoned.update(message["slices"])
            case MessageType.EVALUATE if message.get("between"):
                if self.round is not None and self.round.lease == message["stay"]:
                    self.between = int(message["step"])
            case MessageType.EVALUATE:
                self.evaluate, self.last_step = True, message.get("step")
            case MessageType.SAVE:
                self.save = Save(str(message["id"]), str(message["folder"]))

    def _enter(self, this_round: Round | None) -> None:
        self.round = this_round
        self.begun = this_round or self.begun
        if this_round is not None:
            if self._entered is not None and not this_round.is_same(self._entered):
                self.in_work = None
            self._entered = this_round
        self.assignments.clear()
        self.hedge = None
        self.abandoned.clear()
        self.asked = self.evaluate = False
        self.between = None
        if self.client is not None:
            self.client.close(goodbye=False)

    def _take_course(self, course: Message) -> None:
        self.course = Course.model_validate(course)
        self.course_round = self.round.number if self.round is not None else self.course_round
