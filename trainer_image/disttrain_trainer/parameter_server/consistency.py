"""When a worker may start an iteration, and which gradients become an update: the consistency models as pure state machines.

No tensors, threads, clocks or I/O: a policy gets the events and returns what to do; `shard_host.py` does it under its lock.

- `Sync` (BSP): step v+1 begins when every part of step v is in, added up by a fixed tree (sum_tree.py).
- `Async` (Downpour, Dean et al., NIPS 2012; Hogwild, Recht et al., NIPS 2011): each part is an update at once.
- `BoundedStaleness` (SSP, Ho et al., NIPS 2013): as Async, with a gate at the start of each iteration.

Parts may come in any order, from any worker, more than once, or never. A policy keeps what it has accepted, and each part counts once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from disttrain.api.strategy import Consistency as ConsistencyName
from disttrain.api.strategy import ParameterServerStrategy
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.parameter_server.sum_tree import SumTree


class OutOfStep(Exception):
    """A worker broke the protocol, as with a gradient for a step that has not begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What to do when a part is complete."""

    additions: tuple[tuple[int, int], ...] = ()
    """(a, b): the sum that part b begins is to be added to the one that part a begins. In this order."""
    update: int | None = None
    """Then take an optimiser step with the sum that this part begins, to the next version."""
    summed: int | None = None
    """Then the sum that this part begins is whole, and the step with it waits for `proceed`."""


class Clocks:
    """The iterations that each live worker has completed.

    Invariant: the minimum never decreases. A worker that joins starts at the minimum or later; a worker that leaves no longer counts.
    """

    def __init__(self) -> None:
        self._completed: dict[int, int] = {}
        self.minimum = 0
        """Of the live workers; with none, where the last one stopped."""

    def join(self, worker: int, at: int = 0) -> int:
        """Makes the worker a live one, at `at` or the minimum if that is later. Returns its clock."""
        clock = max(at, self.minimum)
        self._completed[worker] = clock
        self._update()
        return clock

    def leave(self, worker: int) -> None:
        """Forgets the worker; the minimum is that of the others at once."""
        if worker in self._completed:
            del self._completed[worker]
            self._update()

    def complete(self, worker: int, clock: int) -> None:
        """The worker has completed iteration `clock`; idempotent."""
        before = self._completed.get(worker)
        if before is not None and clock >= before:
            self._completed[worker] = clock + 1
            if before == self.minimum:
                self._update()

    def __contains__(self, worker: int) -> bool:
        return worker in self._completed

    @property
    def spread(self) -> int:
        """Iterations by which the fastest live worker is ahead of the slowest."""
        return max(self._completed.values(), default=self.minimum) - self.minimum

    def at_minimum(self) -> list[int]:
        """The live workers that all others wait for."""
        return sorted(worker for worker, clock in self._completed.items() if clock == self.minimum)

    def _update(self) -> None:
        self.minimum = min(self._completed.values(), default=self.minimum)


class Consistency(ABC):
    """A policy: which parts are accepted, when they become an update, and which worker may start an iteration."""

    def __init__(self, *, version: int = 0, accepted: IndexSet | None = None) -> None:
        self.version = version
        """Optimiser steps behind the current parameters."""
        self.accepted = IndexSet() if accepted is None else accepted
        """Every part that counts; pushed again, it is ignored."""
        self.late = 0
        """Gradients that came for a part that was accepted already."""
        self.max_staleness_seen = 0
        """Largest lead over the slowest live worker at the start of an iteration."""

    def arrive(self, index: int, *, empty: bool) -> Arrival | None:
        """A part is complete; `empty`: it has no samples, so no gradient. None when it was accepted already. Raises OutOfStep."""
        if index in self.accepted:
            self.late += 1
            return None
        arrival = self._arrive(index, empty)
        self.accepted.add(index)
        self.version += arrival.update is not None
        return arrival

    @property
    def staleness(self) -> int | None:
        """Iterations by which the fastest live worker is ahead of the slowest now; None where workers wait for one another."""
        return None

    @property
    def in_version(self) -> IndexSet:
        """The parts whose gradients are in the current version: those that a checkpoint of it lists."""
        return self.accepted

    @property
    def waits_for_norm(self) -> bool:
        """Whether the sum of a step is whole, and the step waits for `proceed`."""
        return False

    def proceed(self) -> None:
        """The step that waits is taken: the next version begins."""
        raise OutOfStep("no step waits")

    @property
    @abstractmethod
    def gate(self) -> int:
        """The version that waiting workers wait for: while it is unchanged, none of them may start."""

    @abstractmethod
    def join(self, worker: int, at: int = 0) -> int:
        """A worker begins (again), with clock `at` or later; returns its clock."""

    @abstractmethod
    def leave(self, worker: int) -> None:
        """A worker is idle, ended or lost: no other worker waits for it any more. Idempotent."""

    @abstractmethod
    def complete(self, worker: int, clock: int) -> None:
        """A worker has pushed the gradient of its iteration `clock`."""

    @abstractmethod
    def start(self, worker: int, clock: int, step: int | None) -> bool:
        """Whether the worker may read the parameters now, to start iteration `clock` on `step`. True counts as the start.

        Raises OutOfStep for a worker that did not join.
        """

    @abstractmethod
    def waits_for(self, step: int | None) -> str:
        """What a worker that may not start waits for, for humans."""

    @abstractmethod
    def _arrive(self, index: int, empty: bool) -> Arrival: ...


class Sync(Consistency):
    """Each version is one update with all parts of one step: bitwise equal for any order of arrival and any number of workers."""

    def __init__(self, *, parts_per_step: int, version: int = 0, clips: bool = False) -> None:
        """clips: a step waits, once its sum is whole, for the norm over all shards."""
        super().__init__(
            version=version, accepted=IndexSet.from_intervals([(0, version * parts_per_step)] if version else [])
        )
        self.parts_per_step = parts_per_step
        self._clips = clips
        self._missing, self._tree = parts_per_step, SumTree(parts_per_step)

    def _arrive(self, index: int, empty: bool) -> Arrival:
        step, part = divmod(index, self.parts_per_step)
        if step > self.version:
            raise OutOfStep(f"part {index} is of step {step}, but this shard is at {self.version}")
        first = index - part
        additions = tuple((first + a, first + b) for a, b in self._tree.arrive(part))
        self._missing -= 1
        if self._missing:
            return Arrival(additions=additions)
        if self._clips:
            return Arrival(additions=additions, summed=first)
        self._begin()
        return Arrival(additions=additions, update=first)

    @property
    def waits_for_norm(self) -> bool:
        return not self._missing

    def proceed(self) -> None:
        if self._missing:
            raise OutOfStep(f"step {self.version} is not complete")
        self._begin()
        self.version += 1

    def _begin(self) -> None:
        self._missing, self._tree = self.parts_per_step, SumTree(self.parts_per_step)

    @property
    def in_version(self) -> IndexSet:
        return IndexSet.from_intervals([(0, self.version * self.parts_per_step)] if self.version else [])

    @property
    def gate(self) -> int:
        return self.version

    def join(self, worker: int, at: int = 0) -> int:
        return self.version

    def leave(self, worker: int) -> None:
        pass

    def complete(self, worker: int, clock: int) -> None:
        pass

    def start(self, worker: int, clock: int, step: int | None) -> bool:
        return step is None or self.version >= step

    def waits_for(self, step: int | None) -> str:
        if self.waits_for_norm:
            return f"the norm of the gradient of step {self.version}, of which other shards have parts"
        missing = IndexSet(range(self.version * self.parts_per_step, (self.version + 1) * self.parts_per_step))
        names = [str(index) for index in missing if index not in self.accepted]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"step {self.version} to be complete: part {', '.join(names[:8])}{more} is missing"


class Async(Consistency):
    """Each part is an update at once; no worker waits."""

    def __init__(self, *, version: int = 0, accepted: IndexSet | None = None) -> None:
        super().__init__(version=version, accepted=accepted)
        self._clocks = Clocks()

    def _arrive(self, index: int, empty: bool) -> Arrival:
        return Arrival(update=None if empty else index)

    @property
    def gate(self) -> int:
        return self._clocks.minimum

    @property
    def staleness(self) -> int:
        return self._clocks.spread

    def join(self, worker: int, at: int = 0) -> int:
        return self._clocks.join(worker, at)

    def leave(self, worker: int) -> None:
        self._clocks.leave(worker)

    def complete(self, worker: int, clock: int) -> None:
        self._clocks.complete(worker, clock)

    def start(self, worker: int, clock: int, step: int | None) -> bool:
        if worker not in self._clocks:
            raise OutOfStep(f"worker {worker} starts iteration {clock}, but did not join or has left")
        lead = clock - self._clocks.minimum
        if not self._within(lead):
            return False
        self.max_staleness_seen = max(self.max_staleness_seen, lead)
        return True

    def waits_for(self, step: int | None) -> str:
        slowest = ", ".join(map(str, self._clocks.at_minimum()))
        return f"worker {slowest} to complete iteration {self._clocks.minimum}"

    def _within(self, lead: int) -> bool:
        return True


class BoundedStaleness(Async):
    """As Async, but iteration c starts only if c - min <= max_staleness, min over the live workers' completed iterations.

    So a read at clock c contains every update of iterations <= c - max_staleness - 1 of every live worker, and each worker's own.
    An iteration is completed when every shard has it, so the true clock is the least over the shards, and a gate on each shard
    is the gate on the true minimum.
    """

    def __init__(self, *, max_staleness: int, version: int = 0, accepted: IndexSet | None = None) -> None:
        super().__init__(version=version, accepted=accepted)
        self.max_staleness = max_staleness

    def _within(self, lead: int) -> bool:
        return lead <= self.max_staleness


def build(
    strategy: ParameterServerStrategy,
    *,
    parts_per_step: int,
    version: int = 0,
    accepted: IndexSet | None = None,
    clips: bool = False,
) -> Consistency:
    """The policy that the job names, going on from a checkpoint's version and accepted parts. clips: see Sync."""
    match strategy.consistency:
        case ConsistencyName.SYNC:
            return Sync(parts_per_step=parts_per_step, version=version, clips=clips)
        case ConsistencyName.ASYNC:
            return Async(version=version, accepted=accepted)
        case ConsistencyName.BOUNDED_STALENESS:
            return BoundedStaleness(max_staleness=strategy.max_staleness or 0, version=version, accepted=accepted)
