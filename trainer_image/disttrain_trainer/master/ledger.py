"""Which slice is whose: handed out in order, returned when their worker is lost, counted when every server applied them.

Pure and small: no sockets, no clock, no randomness. It is soft state: a new master makes a new ledger from what the servers
applied. That a slice counts once is the servers' doing; the ledger only sees that each is computed, and seldom twice.
"""

import heapq

from disttrain_trainer.data.slices import SliceSet


class Ledger:
    """The slices [0, total) of a job.

    aligned: for synchronous steps. Slice k is kept for rank k % world_size while that worker lives, so that the slices of a step
    are computed side by side; a worker that took two of one step would make all others wait. Otherwise any worker takes any slice.

    A worker must compute its slices in ascending order. Then the lowest slice that is not done is always the next one of somebody,
    or free, and the job moves on.
    """

    def __init__(self, *, total: int, world_size: int, aligned: bool, done: SliceSet | None = None) -> None:
        self.total = total
        self.world_size = world_size
        self.limit = total
        """Slices from here on are not handed out yet."""
        self._done = done.copy() if done is not None else SliceSet()
        self._lanes = list(range(world_size)) if aligned else [0]
        """The next slice of each lane. Aligned: lane i has the slices k with k % world_size == i."""
        self._stride = len(self._lanes)
        self._returned: list[int] = []
        """A heap of slices that lost their worker."""
        self._leases: dict[int, set[int]] = {}

    @property
    def done(self) -> int:
        """Slices that every server applied."""
        return len(self._done)

    @property
    def step(self) -> int:
        """Whole steps done."""
        return self.done // self.world_size

    @property
    def finished(self) -> bool:
        return self.done == self.total

    @property
    def handed_out(self) -> int:
        """One more than the highest slice that anybody has or had."""
        highest = max((max(lease) for lease in self._leases.values() if lease), default=-1)
        done = self._done.intervals()
        return max(highest, done[-1][1] - 1 if done else -1) + 1

    def join(self, worker: int) -> None:
        """The worker lives: its lane is its own."""
        self._leases.setdefault(worker, set())

    def leave(self, worker: int) -> bool:
        """The worker is lost: what it has returns, its lane is everybody's. Whether it had been there."""
        if worker not in self._leases:
            return False
        self.give_back(worker)
        del self._leases[worker]
        return True

    def give_back(self, worker: int) -> None:
        """The worker computes none of its slices."""
        lease = self._leases[worker]
        for index in lease:
            heapq.heappush(self._returned, index)
        lease.clear()

    def take(self, worker: int, count: int) -> list[int]:
        """At most `count` slices for the worker, ascending; none while there are none below the limit."""
        lease = self._leases[worker]
        taken: list[int] = []
        while len(taken) < count and (index := self._next(worker)) is not None:
            lease.add(index)
            taken.append(index)
        return taken

    def _next(self, worker: int) -> int | None:
        while self._returned and self._returned[0] in self._done:
            heapq.heappop(self._returned)
        best = self._returned[0] if self._returned else self.limit
        source = -1
        for lane in range(len(self._lanes)):
            owner_lives = self._stride > 1 and lane in self._leases and lane != worker
            if owner_lives:
                continue
            while self._lanes[lane] in self._done:
                self._lanes[lane] += self._stride
            if self._lanes[lane] < best:
                best, source = self._lanes[lane], lane
        if best >= self.limit:
            return None
        if source >= 0:
            self._lanes[source] += self._stride
        else:
            heapq.heappop(self._returned)
        return best

    def finish(self, worker: int, slices: list[int]) -> int:
        """The worker says that every server applied these; how many of them are news."""
        lease = self._leases.get(worker, set())
        news = 0
        for index in slices:
            lease.discard(index)
            news += index < self.total and self._done.add(index)
        return news

    def learn(self, applied: SliceSet) -> int:
        """The servers say that all of them applied these; how many are news."""
        news = [index for index in applied if index < self.total and index not in self._done]
        for index in news:
            self._done.add(index)
        return len(news)

    def missing(self, applied: SliceSet) -> list[int]:
        """Slices that were counted as done, but are not applied everywhere: to be computed again. They return to the free ones."""
        gone = [index for index in self._done if index not in applied]
        if gone:
            self._done = self._done.intersection(applied)
            for index in gone:
                heapq.heappush(self._returned, index)
        return gone
