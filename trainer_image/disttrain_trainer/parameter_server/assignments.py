"""The parts that the master assigns to a worker for one round, and what the worker tells it about them.

The control thread receives assignments while the main thread computes, so that no step waits for the master.
"""

from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import Hedge, ParameterServerMember, Round
from disttrain_trainer.net.messages import MessageType, Waited


class Assignments:
    """Of one worker. For the main thread."""

    def __init__(self, control: ControlClient, member: ParameterServerMember) -> None:
        self._control = control
        self._member = member
        self._round: Round | None = None
        self.resumes = False
        """Whether the part that was taken last was in work before this round, so that a gradient of it that is kept counts."""
        self._done: list[int] = []
        """Parts that every server applied and that are not reported to the master yet."""
        self._seconds = 0.0
        """Mean duration of a part, lately."""

    def begin(self, this_round: Round) -> None:
        """Another round: what was done in an earlier one is forgotten. The servers may have gone back to a checkpoint; if they have not,
        they report the applied parts to the master themselves."""
        self._round = this_round
        self._done = []

    @property
    def round(self) -> Round:
        """The present one."""
        assert self._round is not None, "begin comes first"
        return self._round

    @property
    def is_over(self) -> bool:
        """Whether the round is."""
        return self._member.round is not self._round

    @property
    def following(self) -> int | None:
        """The part after this one, if it is assigned already."""
        try:
            return self._member.assignments[0]
        except IndexError:  # not `if assignments`: the control thread may clear them between the two
            return None

    @property
    def waiting(self) -> tuple[int, ...]:
        """The parts that are assigned and not taken, in their order."""
        with self._control.changed:
            return tuple(self._member.assignments)

    def take(self) -> int | None:
        """The next part; None when none is assigned, or the round is over."""
        member = self._member
        with self._control.changed:
            if self.is_over or not member.assignments:
                return None
            index = member.assignments.popleft()
            self.resumes, member.in_work = member.in_work == index, index
            return index

    def put_back(self, index: int) -> None:
        """The part is the next one again: another one is computed before it."""
        with self._control.changed:
            if not self.is_over:
                self._member.assignments.appendleft(index)

    def was_abandoned(self, index: int) -> bool:
        """Whether another worker has done this part meanwhile."""
        return index in self._member.abandoned

    def finished(self, index: int, seconds: float) -> None:
        """Every server has this part, after so many seconds of work."""
        with self._control.changed:
            if self._member.in_work == index:
                self._member.in_work = None
        self._done.append(index)
        self._seconds += (seconds - self._seconds) * 0.1 if self._seconds else seconds

    def ask_for_hedge(self, waited: Waited) -> int | None:
        """The part that this worker, which is free, is to compute once more; None: there is none, or the round is over."""
        with self._control.changed:
            self._member.hedge = None
        self.request(hedge=waited)
        answer = self._control.wait(
            lambda: "over" if self.is_over else self._member.hedge,
            what="the master's answer to a free worker",
            timeout=None,
        )
        return answer.part if isinstance(answer, Hedge) else None

    def request(self, *, force: bool = False, hedge: Waited | None = None) -> None:
        """Reports the parts that are done, and requests more when half of the wanted assignments are used up. hedge: asks for one."""
        member = self._member
        count = member.parts_to_request(self._seconds)
        asks = {} if hedge is None else {"hedge": hedge}
        if count or asks or (force and self._done):
            with self._control.changed:
                if self._round is None or member.round is not self._round:
                    return  # the master ignores a request of an earlier lease, and in the next round it would count as made
                member.asked = member.asked or count > 0
            done, self._done = self._done, []
            self._control.send(MessageType.REQUEST, stay=self._round.lease, count=count, done=done, **asks)
