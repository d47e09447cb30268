"""Which part is whose: handed out in order, returned when their worker is lost, counted when every server applied them.

Pure and small: no sockets, no clock, no randomness. It is soft state: a new master makes a new work queue from what the servers
applied. That a part counts once is the servers' doing; the work queue only sees that each is computed, and seldom twice.
"""

import heapq

from disttrain_trainer.data.index_set import IndexSet


class _Lane:
    """Parts first, first + stride, first + 2 stride …: a cursor, and those behind it that came back."""

    __slots__ = ("cursor", "returned", "stride")

    def __init__(self, *, first: int, stride: int) -> None:
        self.cursor = first
        self.stride = stride
        self.returned: list[int] = []

    def next(self, done: IndexSet) -> int:
        """The lowest part of the lane that nobody has and that is not done."""
        while self.returned and self.returned[0] in done:
            heapq.heappop(self.returned)
        if self.returned:
            return self.returned[0]
        while self.cursor in done:
            self.cursor += self.stride
        return self.cursor

    def advance(self) -> None:
        """Takes what `next` returned."""
        if self.returned:
            heapq.heappop(self.returned)
        else:
            self.cursor += self.stride


class WorkQueue:
    """The parts [0, total) of a job.

    aligned: for synchronous steps. Part k is kept for rank k % world_size while that worker lives, so that the parts of a step
    are computed side by side; a worker that took two of one step would make all others wait. Otherwise any worker takes any part.

    A worker computes its parts in ascending order. Then the lowest part that is not done is always the next one of somebody, or
    free: but whoever waits for it in vain, because it became free, must give its own back and take anew.
    """

    def __init__(self, *, total: int, world_size: int, aligned: bool, done: IndexSet | None = None) -> None:
        self.total = total
        self.world_size = world_size
        self.limit = total
        """Parts from here on are not handed out yet."""
        self._done = done.copy() if done is not None else IndexSet()
        count = world_size if aligned else 1
        self._lanes = [_Lane(first=number, stride=count) for number in range(count)]
        self._leases: dict[int, set[int]] = {}

    @property
    def done(self) -> int:
        """Parts that every server applied."""
        return len(self._done)

    @property
    def step(self) -> int:
        """Whole steps done."""
        return self.done // self.world_size

    @property
    def finished(self) -> bool:
        """Also when more was done already: the job was made shorter after it was trained."""
        return self.done >= self.total

    @property
    def handed_out(self) -> int:
        """One more than the highest part that is done, or that anybody has."""
        done = self._done.intervals()
        highest = max((index for lease in self._leases.values() for index in lease), default=-1)
        return max(highest + 1, done[-1][1] if done else 0)

    def join(self, worker: int) -> None:
        """The worker lives, and has nothing."""
        if worker in self._leases:
            self._give_back(worker)
        self._leases[worker] = set()

    def leave(self, worker: int) -> bool:
        """The worker is lost: what it has returns, its lane is everybody's. False when it was not there."""
        if worker not in self._leases:
            return False
        self._give_back(worker)
        del self._leases[worker]
        return True

    def holds(self, worker: int) -> bool:
        """Whether the worker has parts that are not done."""
        return bool(self._leases.get(worker))

    def recall(self) -> None:
        """What anybody has returns; everybody is to take anew."""
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
        """The worker says that every server applied these."""
        lease = self._leases.get(worker, set())
        for index in parts:
            lease.discard(index)
            if 0 <= index < self.total:
                self._done.add(index)

    def learn(self, applied: IndexSet) -> None:
        """The servers say that all of them applied these."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(self._done.intervals() + applied.intervals()):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self._done = IndexSet.from_intervals(merged)

    def unlearn(self, applied: IndexSet) -> list[int]:
        """Exactly these are applied everywhere: parts that were counted, but are not among them, return. They should be none."""
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
