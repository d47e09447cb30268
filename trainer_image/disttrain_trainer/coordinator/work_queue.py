"""The batch parts of a job: unassigned, assigned to a worker (leased), or applied on every server.

Pure: no sockets, no clock, no randomness. The state is soft: a new master makes a new queue from the parts that the servers applied. The
servers guarantee that a part counts once; the queue sees to it that each part is computed, and rarely twice.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from disttrain_trainer.data.index_set import IndexSet


class Taken(NamedTuple):
    """What a worker has to do of a step."""

    begun: int | None
    """The part that it computes, as far as it has reported; None where that one is done already, by another worker."""
    waiting: list[int]
    """Those that it will compute after it, ascending."""


class WorkQueue:
    """The parts [0, total) of a job.

    aligned: for synchronous steps. A worker holds at most its share of a step, ceil(parts_per_step / workers), so that the parts of a step
    are computed side by side: a worker that held more would make all others wait. Otherwise any worker takes any part.

    A worker computes its parts in ascending order of steps. Invariant of synchronous steps: a part of the lowest unfinished step is either
    assigned to a worker that holds nothing of an earlier step, or unassigned, and some worker that holds nothing of a later step may take
    it. It holds because a worker takes of a later step only when it holds its share of the earlier one, and the shares of all workers
    together are the whole step. When parts return, or a worker leaves and the shares grow, every worker must join again: then its parts
    return, and it requests others. Until then they are its own.
    """

    def __init__(self, *, total: int, parts_per_step: int, aligned: bool, done: IndexSet | None = None) -> None:
        self.total = total
        self.parts_per_step = parts_per_step
        self.limit = total
        """Parts from this number on are not assigned yet: a checkpoint comes before."""
        self.evaluation_limit = total
        """The same: an evaluation comes before."""
        self._aligned = aligned
        self.applied = done.copy() if done is not None else IndexSet()
        """The parts that every server applied."""
        self._open: dict[int, list[int]] = {}
        """Of the steps before `_opened` those with unassigned parts, and these parts; some of them may be done by now."""
        self._opened = 0
        """Steps from this one on have no part that was ever assigned."""
        self._leases: dict[int, set[int]] = {}

    @property
    def done(self) -> int:
        """Number of parts that every server applied."""
        return len(self.applied)

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
        done = self.applied.intervals()
        highest = max((index for lease in self._leases.values() for index in lease), default=-1)
        return max(highest + 1, done[-1][1] if done else 0)

    @property
    def _stop(self) -> int:
        return min(self.limit, self.evaluation_limit)

    def join(self, worker: int) -> None:
        """The worker takes part from now on, without a part."""
        if worker in self._leases:
            self._give_back(worker)
        self._leases[worker] = set()

    def leave(self, worker: int) -> bool:
        """The worker is lost: its parts return, and the share of the others grows. False when it took no part."""
        if worker not in self._leases:
            return False
        self._give_back(worker)
        del self._leases[worker]
        return True

    def holds(self, worker: int) -> bool:
        """Whether the worker has parts that are not done."""
        return bool(self._leases.get(worker))

    def outstanding(self) -> tuple[list[int], dict[int, Taken]]:
        """The parts of the lowest unfinished step that are not done: those that no worker has (below the limit), ascending, and those of
        each worker that has some."""
        low = self.applied.floor // self.parts_per_step * self.parts_per_step
        missing = {part for part in range(low, min(low + self.parts_per_step, self._stop)) if part not in self.applied}
        taken = {}
        for worker, lease in self._leases.items():
            if held := lease & missing:
                first = min(lease)  # done by another worker meanwhile or not: it has not reported it yet
                taken[worker] = Taken(first if first in held else None, sorted(held - {first}))
                missing -= held
        return sorted(missing), taken

    def move(self, part: int, worker: int) -> None:
        """The part is this worker's, whoever had it. It must compute it at once: it may have later ones already."""
        for lease in self._leases.values():
            lease.discard(part)
        step = part // self.parts_per_step
        while self._opened <= step:
            self._open_next()
        if part in self._open.get(step, ()):
            self._close(step, [part])
        self._leases[worker].add(part)

    def reserve(self, worker: int, parts: list[int]) -> None:
        """The worker may have begun these parts: no other worker gets them before `resume`."""
        for part in parts:
            if part < self.total and part not in self.applied and not self.holders(part):
                self.move(part, worker)

    def resume(self, worker: int, parts: list[int]) -> int | None:
        """It is known which parts are applied: the worker goes on with the first of those that were reserved for it and are not applied.
        None where it cannot have begun that one, or it must not be assigned now. The others return.

        parts: in the worker's order. A worker begins a part when every server has the one before. Synchronous steps: it begins one of the
        lowest unfinished step only; of a later one it would wait for parts that may be unassigned."""
        lease = self._leases[worker]
        reserved = [part for part in parts if part in lease]
        lease.difference_update(reserved)
        left = [part for part in reserved if part not in self.applied]
        for part in left:
            self._return(part)
        low = self.applied.floor // self.parts_per_step
        if not left or left[0] >= self._stop or (self._aligned and left[0] // self.parts_per_step > low):
            return None
        self.move(left[0], worker)
        return left[0]

    def holders(self, part: int) -> list[int]:
        """The workers that the part is assigned to: one, or none."""
        return [worker for worker, lease in self._leases.items() if part in lease]

    def can_spare(self, worker: int) -> bool:
        """Whether the invariant of synchronous steps holds without this worker: it holds no part, and no other worker holds a part of a
        later step than one that is unassigned."""
        held = [index for other, lease in self._leases.items() if other != worker for index in lease]
        latest = max(held, default=0) // self.parts_per_step
        earlier = (index for step, parts in self._open.items() if step < latest for index in parts)
        return not self.holds(worker) and all(index in self.applied for index in earlier)

    def take(self, worker: int, count: int) -> list[int]:
        """At most `count` parts for the worker, ascending; none while there are none below the limit."""
        lease, workers = self._leases[worker], len(self._leases)
        share = -(-self.parts_per_step // workers) if self._aligned else self.parts_per_step
        held = Counter(index // self.parts_per_step for index in lease) if self._aligned else Counter()
        first = max(held, default=0)  # of an earlier step than one that it waits for it takes no more
        taken: list[int] = []
        for step in self._steps(first):
            of_step = [index for index in self._open[step] if index < self._stop and index not in self.applied]
            if self._aligned:
                # Its own numbers first: while no worker is lost, each computes the same parts of every step.
                of_step.sort(key=lambda index: (index % self.parts_per_step % workers != worker, index))
            else:
                of_step.sort()
            chosen = sorted(of_step[: max(0, min(share - held[step], count - len(taken)))])
            self._close(step, chosen)
            taken += chosen
            if len(taken) == count:
                break
        lease.update(taken)
        return taken

    def finish(self, worker: int, parts: list[int]) -> None:
        """The worker reports that every server applied these parts."""
        lease = self._leases.get(worker, set())
        for index in parts:
            lease.discard(index)
            if 0 <= index < self.total:
                self.applied.add(index)

    def learn(self, applied: IndexSet) -> None:
        """Every server applied these parts."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(self.applied.intervals() + applied.intervals()):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self.applied = IndexSet.from_intervals(merged)

    def unlearn(self, applied: IndexSet) -> list[int]:
        """Every server applied exactly these parts. Parts that were counted but are not among them return, and are returned; there should
        be none."""
        before, self.applied = self.applied, self.applied.intersection(applied)
        gone = [] if len(before) == len(self.applied) else [index for index in before if index not in applied]
        for index in gone:
            self._return(index)
        return gone

    def _steps(self, first: int) -> Iterator[int]:
        """The steps from `first` on that have unassigned parts below the limit, ascending; opens further ones."""
        yield from [step for step in sorted(self._open) if step >= first]
        while self._opened * self.parts_per_step < min(self._stop, self.total):
            step = self._open_next()
            if step in self._open:
                yield step

    def _open_next(self) -> int:
        """Opens one step more; its number. It has no open part where all are done."""
        step, self._opened = self._opened, self._opened + 1
        begin = step * self.parts_per_step
        if parts := [index for index in range(begin, begin + self.parts_per_step) if index not in self.applied]:
            self._open[step] = parts
        return step

    def _close(self, step: int, chosen: list[int]) -> None:
        """These parts are assigned, and the others of the step that are done are no longer open."""
        left = [index for index in self._open[step] if index not in chosen and index not in self.applied]
        if left:
            self._open[step] = left
        else:
            del self._open[step]

    def _give_back(self, worker: int) -> None:
        for index in self._leases[worker]:
            self._return(index)
        self._leases[worker] = set()

    def _return(self, index: int) -> None:
        step = index // self.parts_per_step
        if step < self._opened:
            self._open.setdefault(step, []).append(index)
