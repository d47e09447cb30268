"""Which part of a synchronous step a free worker computes once more: the decision behind strategy.parameterServer.backupWorkers. Pure.

A hedge is a part that another worker holds, or that no worker has taken yet. Where two workers compute it the first copy that reaches a
server counts there; the second one is late and changes nothing, as the two are bitwise equal. So no sample is dropped and no bit changes;
what a hedge costs is the time of a worker that had nothing else to do. (Chen et al., "Revisiting distributed synchronous SGD", 2016, drop
the late gradients instead; hedged requests are those of Dean and Barroso, "The tail at scale", CACM 2013.)
"""

from typing import NamedTuple

from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import ParameterServerStrategy
from disttrain_trainer.coordinator.work_queue import WorkQueue


class Given(NamedTuple):
    """A part for a free worker."""

    part: int
    former: int | None
    """The worker that had it and has it no more, as the master tells it. None: no worker had it, or it is a copy of one that its holder
    computes."""


class Hedges:
    """The hedges of one work queue.

    most: how many may be outstanding at once (backupWorkers). A hedge is outstanding until its worker reports it, or leaves, or the part
    is done. Only parts of the lowest unfinished step are hedged: no worker can begin a later one.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._given: dict[int, int] = {}
        """The worker of each hedge, by part, until a worker reports the part: the servers may have said before that it is done."""
        self._former: dict[int, int] = {}
        """Of a part that was moved the worker that had it, which may have begun it before the master's message arrived."""
        self._turn = 0
        self._reported: dict[int, int] = {}
        """The turn in which each worker last reported a part, or got a hedge: who has the oldest outstanding part."""

    @classmethod
    def of(cls, config: JobConfig) -> "Hedges | None":
        """Those of a job with backup workers; None for any other."""
        exchange = config.strategy.exchange
        backups = exchange.backup_workers if isinstance(exchange, ParameterServerStrategy) else 0
        return cls(backups) if backups else None

    def outstanding(self, queue: WorkQueue) -> dict[int, int]:
        """The worker of each outstanding hedge, by part."""
        return {part: worker for part, worker in self._given.items() if part not in queue.applied}

    def give(self, worker: int, queue: WorkQueue, *, begun: bool) -> Given | None:
        """A part for a free worker, of the lowest unfinished step; None where there is none for it, or enough are outstanding.

        First comes a part that no worker has taken; then one that its holder has not begun, the last of the holder that has most of them:
        it would be done the latest. Such a part moves to the free worker, since a holder that begins it, too, is late for the next step.
        begun: the worker has waited for as long as a part takes, so that it gets also a copy of a part that its holder computes now, the
        oldest.
        """
        given = self.outstanding(queue)
        if len(given) >= self._most or worker in given.values() or queue.finished:
            return None
        untaken, taken = queue.outstanding()
        if untaken:
            return self._move(worker, untaken[0], None, queue)
        taken.pop(worker, None)
        waiting = {other: parts.waiting for other, parts in taken.items() if parts.waiting}
        if waiting:
            behind = max(waiting, key=lambda other: (len(waiting[other]), -other))
            return self._move(worker, waiting[behind][-1], behind, queue)
        computed = {other: parts.begun for other, parts in taken.items() if parts.begun is not None}
        computed = {other: part for other, part in computed.items() if given.get(part, other) == other}
        if begun and computed:
            slowest = min(computed, key=lambda other: (self._reported.get(other, 0), other))
            return self._give(worker, computed[slowest], None)
        return None

    def finish(self, worker: int, parts: list[int], queue: WorkQueue) -> dict[int, list[int]]:
        """A worker reports parts. Returns, by worker, those of them that others compute or hold: they need not."""
        self._turn += 1
        self._reported[worker] = self._turn
        others: dict[int, list[int]] = {}
        for part in parts:
            hedger, former = self._given.pop(part, None), self._former.pop(part, None)
            if hedger is None and former is None:
                continue
            for other in {hedger, former, *queue.holders(part)} - {worker}:
                if other is not None:
                    others.setdefault(other, []).append(part)
        return others

    def leave(self, worker: int) -> None:
        """The worker is lost, or starts over: what it hedged may be hedged again."""
        self._given = {part: other for part, other in self._given.items() if other != worker}
        self._former = {part: other for part, other in self._former.items() if other != worker}
        self._reported.pop(worker, None)

    def _move(self, worker: int, part: int, former: int | None, queue: WorkQueue) -> Given:
        queue.move(part, worker)
        if former is not None:
            self._former[part] = former
        return self._give(worker, part, former)

    def _give(self, worker: int, part: int, former: int | None) -> Given:
        self._given[part] = worker
        self._turn += 1
        self._reported[worker] = self._turn
        return Given(part, former)
