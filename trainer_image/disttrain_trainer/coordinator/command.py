"""The coordinator of a `command`: its programs run without our agent, so the master only keeps their progress until it receives SIGTERM."""

from disttrain_trainer.coordinator.printed_reports import PrintedReports
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.messages import Message
from disttrain_trainer.net.peers import Member


class CommandCoordinator:
    """Counts what `session.report` says, or what the programs print. No process joins."""

    def __init__(self, *, tracker: Tracker, workers: int) -> None:
        self._tracker = tracker
        self._workers = workers
        self._printed = PrintedReports()
        self._largest_group = 0
        """Size of the largest process group that a process reported; 0 while none did."""
        self.ended = False
        self.released = False

    def joined(self, member: Member, hello: Message, now: float) -> None:
        pass

    def on_message(self, member: Member, message: Message, now: float) -> None:
        pass

    def lost(self, member: Member, now: float) -> None:
        pass

    def reported(self, rank: int, message: Message, now: float) -> None:
        tracker = self._tracker
        counted = self._printed.admit(rank, message)
        if counted is None:
            return
        message = counted
        tracker.report(rank=rank, samples=int(message.get("samples") or 0), loss=message.get("loss"), now=now)
        tracker.total_steps = message.get("total_steps") or tracker.total_steps
        if message.get("epoch") is not None:
            tracker.reported_epoch = int(message["epoch"])
        if message.get("step") is not None:
            tracker.reach(int(message["step"]))
        self._compare(int(message.get("world") or 0))

    def _compare(self, size: int) -> None:
        """Warns while the processes that report train apart: each pod would then train a model of its own, and all of them succeed."""
        largest = self._largest_group = max(self._largest_group, size)
        self._tracker.warning = (
            f"the job has {self._workers} workers, but no process reported a world of more than {largest}: the workers may have "
            "trained separate models. A bare torchrun takes its options from the PET_* variables of the pod; other launchers need "
            "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            if 0 < largest < self._workers
            else None
        )

    def tick(self, now: float) -> None:
        pass

    def terminate(self, now: float) -> None:
        self.released = True

    def waiting_for(self, now: float) -> str | None:
        return None
