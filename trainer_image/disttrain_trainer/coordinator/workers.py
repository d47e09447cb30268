"""The workers of parameter servers, as the master knows them: which are connected, with which lease, and which wait for parts.

Pure; the sender sends.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from disttrain.api.names import Role
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.coordinator.hedging import Hedges
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.net.members import Round, course_field
from disttrain_trainer.net.messages import Message, MessageType, Waited
from disttrain_trainer.net.peers import Member, Sender


@dataclass(frozen=True, slots=True)
class _Begun:
    """The parts that a worker may have begun, and the round that they are of."""

    of: Round
    parts: list[int]
    """In the worker's order."""


class Workers:
    """The live workers."""

    def __init__(
        self,
        *,
        sender: Sender,
        tracker: Tracker,
        incarnation: str,
        hedges: Hedges | None = None,
        processes: int = 1,
    ) -> None:
        """incarnation: the master's, another one in each of its processes. hedges: of a job with backup workers. processes: of each
        worker, which is a group where they are several."""
        self._processes = processes
        self._hedges = hedges
        self._sender = sender
        self._tracker = tracker
        self._incarnation = incarnation
        self._invited = 0
        self._leases: dict[int, str] = {}
        """The present lease of each invited worker. Unique over masters, which the number of a round is not when all servers and the master
        are new."""
        self._begun: dict[int, _Begun] = {}
        """Of workers that wait for a round."""
        self._reserved: dict[int, list[int]] = {}
        """Of invited workers the parts that they may have begun, until the servers have said which of them are applied."""
        self._wants: dict[int, int] = {}
        """Workers that wait for parts, and how many each requested."""
        self.live: dict[int, int | None] = {}
        """Number of samples of each worker's data set; None while the worker starts."""
        self.data: DataSet | None = None
        """The data set of all of them, once one of them has sent it."""
        self.buffers = False
        """A checkpoint needs a file of one of them."""
        self.keep_model = False
        """They have a place for the trained model."""
        self.paused: int | None = None
        """The worker that evaluates between two steps, or is to do so when its parts are done: it gets none."""
        self.retiring: set[int] = set()
        """Workers of an elastic job that leave for good once their parts are done: they get no other work."""
        self._released: set[int] = set()
        """Those of them that may end."""

    @property
    def ready(self) -> list[int]:
        """The workers that can evaluate or save, the one that joined first at the front: its buffers have seen most samples."""
        return [rank for rank, samples in self.live.items() if samples is not None and rank not in self.retiring]

    def join(self, rank: int) -> None:
        """A worker joined; it is starting."""
        self.retiring.discard(rank)
        self._released.discard(rank)
        self.live[rank] = None

    def admit(self, rank: int, message: Message) -> bool:
        """A worker is ready. False when its data set is not that of the others; then the worker gets WRONG."""
        data = DataSet.of(message)
        if self.data is not None and self.data != data:
            reason = f"worker-{rank} has {data.difference(self.data)}: trainer.dataset must be the same everywhere"
            self._sender.send(Member(Role.WORKER, rank), MessageType.WRONG, reason=reason)
            return False
        self.data, self.live[rank] = data, data.samples
        self.buffers = bool(message.get("buffers"))
        self.keep_model = bool(message.get("keeps_model"))
        self._wants.pop(rank, None)
        self._begun.pop(rank, None)
        if begun := message.get("begun"):
            of = Round(int(begun["generation"]), lease=str(begun["stay"]), servers=tuple(begun["servers"]))
            self._begun[rank] = _Begun(of, list(begun["slices"]))
        return True

    def invite(
        self,
        rank: int,
        *,
        queue: WorkQueue,
        round_number: int,
        buffers: str | None,
        from_scratch: bool,
        primaries: Sequence[int],
        servers: Sequence[str],
        course: Course | None = None,
    ) -> None:
        """Sends a worker into the round, with a new lease. buffers: the newest checkpoint's file of them. from_scratch: there is no
        checkpoint. primaries: the server of each shard. servers: the incarnations of these.

        The parts of this round that the worker may have begun are no other worker's: `serve` assigns it the one that it did begin."""
        queue.join(rank)
        self._invited += 1
        self._leases[rank] = f"{self._incarnation}.{self._invited}"
        begun, this_round = self._begun.pop(rank, None), Round(round_number, self._leases[rank], servers=tuple(servers))
        self._reserved.pop(rank, None)
        if begun is not None and self._hedges is None and begun.of.is_same(this_round):
            queue.reserve(rank, begun.parts)
            self._reserved[rank] = begun.parts
        if self._hedges is not None:
            self._hedges.leave(rank)
        self._count()
        fields: Message = {
            "generation": round_number,
            "stay": self._leases[rank],
            "buffers": buffers,
            "anew": from_scratch,
        }
        fields |= {"primaries": list(primaries), "servers": list(servers)}
        fields |= course_field(course or Course())
        self._sender.send(Member(Role.WORKER, rank), MessageType.ROUND, **fields)

    def take(self, rank: int, message: Message, queue: WorkQueue) -> bool:
        """Records which parts a worker did and how many it requests. False for a message of an earlier lease: its parts have returned."""
        if not self.holds_lease(rank, message):
            return False
        if self._hedges is not None:
            for other, parts in self._hedges.finish(rank, message["done"], queue).items():
                if other in self._leases:
                    self._sender.send(
                        Member(Role.WORKER, other), MessageType.ABANDON, stay=self._leases[other], slices=parts
                    )
        queue.finish(rank, message["done"])
        if message["count"]:
            self._wants[rank] = int(message["count"])
        if self._hedges is not None and message.get("hedge"):
            begun, stays = message["hedge"] == Waited.A_PART, rank not in self.retiring
            given = self._hedges.give(rank, queue, begun=begun) if stays else None
            if given is not None and given.former in self._leases:
                former, lease = Member(Role.WORKER, given.former), self._leases[given.former]
                self._sender.send(former, MessageType.MOVED, stay=lease, slices=[given.part])
            part = given.part if given is not None else None
            self._sender.send(Member(Role.WORKER, rank), MessageType.HEDGE, stay=self._leases[rank], part=part)
        return True

    def is_invited(self, rank: int) -> bool:
        """Whether the worker has a lease: the master has not called it away."""
        return rank in self._leases

    def holds_lease(self, rank: int, message: Message) -> bool:
        """Whether the message carries the worker's present lease. A message of an earlier lease must change nothing."""
        return message.get("stay") is not None and message.get("stay") == self._leases.get(rank)

    def serve(self, queue: WorkQueue) -> None:
        """Assigns the parts that workers have begun to these, and unassigned ones to the workers that wait for some. Call it when it is
        known which parts are applied."""
        reserved, self._reserved = self._reserved, {}
        for rank, begun in reserved.items():
            if (part := queue.resume(rank, begun)) is not None:
                self._sender.send(Member(Role.WORKER, rank), MessageType.ASSIGN, stay=self._leases[rank], slices=[part])
        for rank in [rank for rank in self._wants if rank not in self.retiring and rank != self.paused]:
            parts = queue.take(rank, self._fair(self._wants[rank], queue))
            if parts:
                del self._wants[rank]
                self._sender.send(Member(Role.WORKER, rank), MessageType.ASSIGN, stay=self._leases[rank], slices=parts)

    def evaluate(self, rank: int, step: int) -> None:
        """Has a worker evaluate the parameters of a step, while the training goes on."""
        member = Member(Role.WORKER, rank)
        self._sender.send(member, MessageType.EVALUATE, stay=self._leases.get(rank), step=step, between=True)

    def lose(self, rank: int) -> None:
        """A worker is lost."""
        self.live.pop(rank, None)
        self._wants.pop(rank, None)
        self._leases.pop(rank, None)
        self._begun.pop(rank, None)
        self._reserved.pop(rank, None)
        if self._hedges is not None:
            self._hedges.leave(rank)
        self.retiring.discard(rank)
        self._released.discard(rank)
        self._tracker.forget(rank)
        self._count()

    def retire(self, rank: int, queue: WorkQueue | None) -> None:
        """A worker of an elastic job leaves for good, once its parts are done."""
        self.retiring.add(rank)
        self._count()
        self.release_retired(queue)

    def release_retired(self, queue: WorkQueue | None) -> None:
        """Lets the workers go that leave for good and hold no part."""
        for rank in self.retiring - self._released:
            if queue is None or not queue.holds(rank):
                self._released.add(rank)
                self._sender.send(Member(Role.WORKER, rank), MessageType.RELEASED)

    def end_leases(self, *, but: int | None = None) -> None:
        """Ends every lease except that of `but`: messages that carry one are ignored from now on."""
        for rank in self._leases:
            if self._hedges is not None and rank != but:
                self._hedges.leave(rank)
        self._leases = {rank: lease for rank, lease in self._leases.items() if rank == but}
        self._wants.clear()
        self._reserved.clear()

    def send_to_all(self, kind: MessageType, *, but: Collection[int | None] = ()) -> None:
        """Sends to every worker except those of `but`."""
        for rank in self.live:
            if rank not in but:
                self._sender.send(Member(Role.WORKER, rank), kind)

    def _count(self) -> None:
        self._tracker.world_size = len(self.ready) * self._processes

    def _fair(self, count: int, queue: WorkQueue) -> int:
        """How many parts to assign at once: fewer toward the end, so that all workers end together (guided self-scheduling,
        Polychronopoulos and Kuck 1987)."""
        return max(1, min(count, (queue.total - queue.done) // (2 * max(1, len(self.live)))))
