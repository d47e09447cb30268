"""What a process computes next is loaded before it is needed, by processes of its own, each batch under the number of its part."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import ParameterServerStrategy
from disttrain_trainer.data.inner_batches import Portions, inner_batches
from disttrain_trainer.data.loader import Fetcher, pinned
from disttrain_trainer.data.loader_processes import Around, Key, LoaderProcesses
from disttrain_trainer.data.schedule import BatchPart, Schedule
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)


class Loaders(Protocol):
    """See LoaderProcesses."""

    @property
    def ahead(self) -> int: ...
    def foresee(self, now: Iterable[Key], coming: Iterable[Key]) -> None: ...
    def take(self, key: Key) -> Any: ...


class Loading:
    """The batches of the parts that a process computes, loaded ahead. For the training thread."""

    def __init__(self, loaders: Loaders, schedule: Schedule, *, batches: int = 1) -> None:
        """batches: of a part, at most; more than one with local steps, or where the gradients of portions add up."""
        self._loaders = loaders
        self._batches = batches
        self._schedule = schedule
        self.ahead = -(-loaders.ahead // batches)
        """Parts that are worth being known beyond the one in work."""

    def foresee(self, now: Iterable[int], coming: Iterable[int]) -> None:
        """The parts that are computed now, and those after them, as far as that is known, soonest first. Does not block. Raises
        LoaderLost."""
        self._loaders.foresee(self._keys(now), self._keys(coming))

    def foresee_steps(self, step: int, numbers: Iterable[int]) -> None:
        """The same of a process that computes the parts of these numbers, counted from 0, of this step and of each one after it."""
        size, numbers = self._schedule.parts_per_step, list(numbers)
        steps = range(step + 1, self._schedule.total_steps)
        self.foresee(
            (step * size + number for number in numbers),
            (later * size + number for later in steps for number in numbers),
        )

    def take(self, part: BatchPart) -> Any:
        """The batch of a part, on the CPU; waits for it. Raises NotForeseen, LoaderLost, and what loading it raised."""
        return self._loaders.take((part.index, part.batch))

    def _keys(self, parts: Iterable[int]) -> Iterator[Key]:
        return ((part, batch) for part in parts for batch in range(self._batches))


def begin(config: JobConfig, *, fetch: Fetcher, schedule: Schedule, dataset: Any, around: Around) -> Loading | None:
    """Starts the loader processes that the job asks for; None where it asks for none, or they would only be in the way.

    schedule: one that no other thread uses. around: entered in each process before the user's code runs there.
    """
    count = config.trainer.loader_workers
    if not count:
        return None
    if not fetch.by_sample:
        log.info(
            "trainer.loaderWorkers: no process is started for a %s, whose batches are made at once",
            type(dataset).__name__,
        )
        return None
    portions, full = Portions(config), config.trainer.batch_size // config.parts_per_step
    steps = _local_steps(config)

    def load(key: Key) -> Any:
        part = schedule.part(key[0])
        batches = portions.of(part) if steps == 1 else inner_batches(part, steps, full)
        if not part.samples or key[1] >= len(batches):
            return None  # no thread takes it
        batch = batches[key[1]]
        return fetch.load(batch.indices, batch.epoch)

    receive: Callable[[Any], Any] = pinned if fetch.device.type == "cuda" else lambda batch: batch
    loaders = LoaderProcesses(count, load, dataset=dataset, around=around, receive=receive)
    return Loading(loaders, schedule, batches=max(steps, portions.count))


def _local_steps(config: JobConfig) -> int:
    exchange = config.strategy.exchange
    return exchange.local_steps if isinstance(exchange, ParameterServerStrategy) else 1
