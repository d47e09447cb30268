"""The coordinator of a `command`: its programs run without our agent, so the master only keeps their progress until it is told to end."""

from disttrain_trainer.master.member import Member
from disttrain_trainer.master.tracker import Tracker
from disttrain_trainer.messages import Message


class Bystander:
    """Counts what `session.report` says. Nobody joins."""

    def __init__(self, *, tracker: Tracker) -> None:
        self._tracker = tracker
        self.ended = False
        self.released = False

    def joined(self, member: Member, hello: Message, now: float) -> None:
        pass

    def heard(self, member: Member, message: Message, now: float) -> None:
        pass

    def lost(self, member: Member, now: float) -> None:
        pass

    def reported(self, rank: int, message: Message, now: float) -> None:
        tracker = self._tracker
        tracker.report(rank=rank, samples=int(message.get("samples") or 0), loss=message.get("loss"), now=now)
        tracker.total_steps = message.get("total_steps") or tracker.total_steps
        if message.get("step") is not None:
            tracker.reach(int(message["step"]))

    def tick(self, now: float) -> None:
        pass

    def terminate(self, now: float) -> None:
        self.released = True

    def waiting_for(self, now: float) -> str | None:
        return None
