"""The batch parts of a job: unassigned, assigned to a worker (leased), or applied on every server.

Pure: no sockets, no clock, no randomness. The state is soft: a new master makes a new queue from the parts that the servers applied. The
servers guarantee that a part counts once; the queue sees to it that each part is computed, and rarely twice.
"""

import heapq

from disttrain_trainer.data.index_set import IndexSet


class _Lane:
    """The parts first, first + stride, first + 2 stride …: a cursor, and the parts before it that returned."""

    __slots__ = ("cursor", "returned", "stride")

    def __init__(self, *, first: int, stride: int) -> None:
        self.cursor = first
        self.stride = stride
        self.returned: list[int] = []

    def next(self, done: IndexSet) -> int:
        """The lowest part of the lane that is neither assigned nor done."""
        while self.returned and self.returned[0] in done:
            heapq.heappop(self.returned)
        if self.returned:
            return self.returned[0]
        while self.cursor in done:
            self.cursor += self.stride
        return self.cursor

    def advance(self) -> None:
        """Moves past the part that `next` returned."""
        if self.returned:
            heapq.heappop(self.returned)
        else:
            self.cursor += self.stride


class WorkQueue:
    """The parts [0, total) of a job.

    aligned: for synchronous steps. Part k is kept for rank k % parts_per_step while that worker lives, so that the parts of a step
    are computed side by side; a worker that took two of one step would make all others wait. Otherwise any worker takes any part.

    A worker computes its parts in ascending order. Invariant: the lowest unfinished part is either assigned to a worker as its next one, or
    unassigned. When it becomes unassigned, the workers that wait for it must return their parts and request again (`recall`).
    """

    def __init__(self, *, total: int, parts_per_step: int, aligned: bool, done: IndexSet | None = None) -> None:
        self.total = total
        self.parts_per_step = parts_per_step
        self.limit = total
        """Parts from this number on are not assigned yet."""
        self._done = done.copy() if done is not None else IndexSet()
        count = parts_per_step if aligned else 1
        self._lanes = [_Lane(first=number, stride=count) for number in range(count)]
        self._leases: dict[int, set[int]] = {}

    @property
    def done(self) -> int:
        """Number of parts that every server applied."""
        return len(self._done)

    @property
    def step(self) -> int:
        """Number of whole steps done."""
        return self.done // self.parts_per_step

    @property
    def finished(self) -> bool:
        """Whether all parts are done; also when more are, because the job was made shorter after it was trained."""
        return self.done >= self.total

    @property
    def handed_out(self) -> int:
        """One more than the highest part that is done or assigned."""
        done = self._done.intervals()
        highest = max((index for lease in self._leases.values() for index in lease), default=-1)
        return max(highest + 1, done[-1][1] if done else 0)

    def join(self, worker: int) -> None:
        """The worker takes part from now on, without a part."""
        if worker in self._leases:
            self._give_back(worker)
        self._leases[worker] = set()

    def leave(self, worker: int) -> bool:
        """The worker is lost: its parts return, and any worker may take from its lane. False when it took no part."""
        if worker not in self._leases:
            return False
        self._give_back(worker)
        del self._leases[worker]
        return True

    def holds(self, worker: int) -> bool:
        """Whether the worker has parts that are not done."""
        return bool(self._leases.get(worker))

    def recall(self) -> None:
        """All assigned parts return; every worker must request again."""
        for worker in self._leases:
            self._give_back(worker)

    def take(self, worker: int, count: int) -> list[int]:
        """At most `count` parts for the worker, ascending; none while there are none below the limit."""
        lease = self._leases[worker]
        single = len(self._lanes) == 1
        lanes = [
            lane for number, lane in enumerate(self._lanes) if single or number == worker or number not in self._leases
        ]
        taken: list[int] = []
        while len(taken) < count:
            lane = min(lanes, key=lambda lane: lane.next(self._done))
            index = lane.next(self._done)
            if index >= self.limit:
                break
            lane.advance()
            lease.add(index)
            taken.append(index)
        return taken

    def finish(self, worker: int, parts: list[int]) -> None:
        """The worker reports that every server applied these parts."""
        lease = self._leases.get(worker, set())
        for index in parts:
            lease.discard(index)
            if 0 <= index < self.total:
                self._done.add(index)

    def learn(self, applied: IndexSet) -> None:
        """Every server applied these parts."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(self._done.intervals() + applied.intervals()):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self._done = IndexSet.from_intervals(merged)

    def unlearn(self, applied: IndexSet) -> list[int]:
        """Every server applied exactly these parts. Parts that were counted but are not among them return, and are returned; there should
        be none."""
        before, self._done = self._done, self._done.intersection(applied)
        gone = [] if len(before) == len(self._done) else [index for index in before if index not in applied]
        for index in gone:
            self._return(index)
        return gone

    def _give_back(self, worker: int) -> None:
        for index in self._leases[worker]:
            self._return(index)
        self._leases[worker] = set()

    def _return(self, index: int) -> None:
        heapq.heappush(self._lanes[index % len(self._lanes)].returned, index)
