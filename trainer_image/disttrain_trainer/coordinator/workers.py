"""The workers of parameter servers, as the master knows them: who is there, in which stay, and who waits for parts.

Pure; sending is the sender's.
"""

from disttrain.api.names import Role
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member, Sender


class Workers:
    """The live workers."""

    def __init__(self, *, sender: Sender, tracker: Tracker, incarnation: str) -> None:
        """incarnation: the master's, another one in each of its processes."""
        self._sender = sender
        self._tracker = tracker
        self._incarnation = incarnation
        self._invited = 0
        self._leases: dict[int, str] = {}
        """The present stay of each invited worker. Unique over masters: a round is not, when all servers and the master are new."""
        self._wants: dict[int, int] = {}
        """Workers that asked for parts and got none yet."""
        self.live: dict[int, int | None] = {}
        """How many samples each one's dataset has; None while it is starting."""
        self.data: DataSet | None = None
        """The data set of all of them, once one of them has sent it."""
        self.buffers = False
        """The model has buffers."""
        self.keep_model = False
        """They have a place for the trained model."""

    @property
    def ready(self) -> list[int]:
        """Those that can be asked for something, the one that is there longest first: its buffers have seen most."""
        return [rank for rank, samples in self.live.items() if samples is not None]

    def join(self, rank: int) -> None:
        """A worker is there, and starting."""
        self.live[rank] = None

    def admit(self, rank: int, message: Message) -> bool:
        """A worker is ready. False, and it is told so, when its dataset is not that of the others."""
        data = DataSet(int(message["samples"]), message.get("fingerprint"))
        if self.data is not None and self.data != data:
            reason = f"worker-{rank} has {data.difference(self.data)}: trainer.dataset must be the same everywhere"
            self._sender.send(Member(Role.WORKER, rank), MessageType.WRONG, reason=reason)
            return False
        self.data, self.live[rank] = data, data.samples
        self.buffers = bool(message.get("buffers"))
        self.keep_model = bool(message.get("keeps_model"))
        self._wants.pop(rank, None)
        return True

    def invite(
        self, rank: int, *, queue: WorkQueue, round_number: int, buffers: str | None, from_scratch: bool
    ) -> None:
        """Begins a stay. buffers: the newest checkpoint's file of them. anew: there is no checkpoint."""
        queue.join(rank)
        self._invited += 1
        lease = self._leases[rank] = f"{self._incarnation}.{self._invited}"
        self._count()
        fields = {"generation": round_number, "stay": lease, "buffers": buffers, "anew": from_scratch}
        self._sender.send(Member(Role.WORKER, rank), MessageType.ROUND, **fields)

    def take(self, rank: int, message: Message, queue: WorkQueue) -> bool:
        """Notes what a worker did, and what it wants. False for what was said before the worker heard that its parts are void."""
        if not self.holds_lease(rank, message):
            return False
        queue.finish(rank, message["done"])
        if message["count"]:
            self._wants[rank] = int(message["count"])
        return True

    def holds_lease(self, rank: int, message: Message) -> bool:
        """Whether a worker said this of what it does now, and not of an earlier stay, of which nothing is left."""
        return message.get("stay") is not None and message.get("stay") == self._leases.get(rank)

    def serve(self, queue: WorkQueue) -> None:
        """Hands out what is free to those who wait."""
        for rank in list(self._wants):
            parts = queue.take(rank, self._fair(self._wants[rank], queue))
            if parts:
                del self._wants[rank]
                self._sender.send(Member(Role.WORKER, rank), MessageType.ASSIGN, stay=self._leases[rank], slices=parts)

    def lose(self, rank: int) -> None:
        """A worker is gone."""
        self.live.pop(rank, None)
        self._wants.pop(rank, None)
        self._leases.pop(rank, None)
        self._tracker.forget(rank)
        self._count()

    def end_leases(self) -> None:
        """What anybody says of the present stay does not count any more."""
        self._leases.clear()
        self._wants.clear()

    def send_to_all(self, kind: MessageType, *, but: int | None = None) -> None:
        """Sends to all of them, but one."""
        for rank in self.live:
            if rank == but:
                continue
            self._sender.send(Member(Role.WORKER, rank), kind)

    def _count(self) -> None:
        self._tracker.world_size = len(self.ready)

    def _fair(self, count: int, queue: WorkQueue) -> int:
        """Toward the end in smaller portions, so that all workers end together (guided self-scheduling, Polychronopoulos and Kuck 1987)."""
        return max(1, min(count, (queue.total - queue.done) // (2 * max(1, len(self.live)))))
