"""An iterable data set: a stream of samples that have no numbers. Each rank reads one of its own, and no part of it twice.

A batch of a part is the next samples of the stream. Those of the newest step are kept, since a step that breaks is computed again. When a
stream ends it begins again: another pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import Sharding
from disttrain.api.trainer import LastBatch
from disttrain_trainer.data.chance import SampleSeeds
from disttrain_trainer.data.loader import MOST_SAMPLES, Collate, Fetcher, default_collate_of, guarded_batch
from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.errors import UserError, WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

SAMPLES: Final = MOST_SAMPLES
"""Taken for the length of a stream, so that its steps are those of one epoch."""


def is_stream(dataset: Any) -> bool:
    """Whether samples can only be read one after another. A DataLoader is none: it gives batches."""
    if isinstance(dataset, IterableDataset):
        return True
    others = ("__getitem__", "__len__", "__next__", "batch_sampler")
    return hasattr(dataset, "__iter__") and not any(hasattr(dataset, name) for name in others)


def of(config: JobConfig, dataset: Any, *, field: str, collate: Collate | None, rank: int) -> "Stream | None":
    """The stream of this rank; None for a data set that is none. Raises WrongInput where the job cannot take one."""
    if not is_stream(dataset):
        return None
    trainer, kind = config.trainer, f"{field} returned a {type(dataset).__name__}, which is iterable"
    sharding = getattr(config.strategy.exchange, "sharding", None)
    if sharding is not Sharding.REPLICATED or config.elastic:
        raise WrongInput(
            f"{kind}; expected a map-style dataset, with __len__ and __getitem__: only strategy.type DataParallel with sharding "
            "Replicated, without worker.elastic, takes an iterable one"
        )
    if trainer.max_steps is None:
        raise WrongInput(f"trainer.epochs: {kind}, and its length is not known: set trainer.maxSteps instead")
    if trainer.last_batch is not LastBatch.KEEP:
        raise WrongInput(f"trainer.lastBatch: {kind}, and has no last batch: leave lastBatch out")
    if trainer.loader_workers:
        raise WrongInput(
            f"trainer.loaderWorkers: {kind}, and is read by the process that trains: set loaderWorkers to 0"
        )
    if trainer.nan_policy is not None and trainer.nan_policy.roll_backs:
        raise WrongInput(
            f"trainer.nanPolicy.rollBacks: {kind}, and no part of it can be left out by number: set rollBacks to 0"
        )
    made = Stream(
        dataset, collate=collate or default_collate_of(field), seed=trainer.seed, rank=rank, ranks=config.world_size
    )
    if not made.stateful:
        log.warning(
            "%s: without state_dict() and load_state_dict() its samples are trained at least once after a restart, not exactly once",
            kind,
        )
    return made


class StreamOrder:
    """The `Order` of a stream: its samples have the numbers of their positions."""

    name = "stream"

    def __call__(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return positions


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stream is."""

    passes: int = 0
    """Whole passes before this one."""
    taken: int = 0
    """Samples of this pass that were taken."""
    state: Any = None
    """What the data set's state_dict() said there."""


class Stream:
    """The stream of one rank. For the training thread; its methods raise what the user's code raises."""

    def __init__(self, dataset: Any, *, collate: Collate, seed: int, rank: int, ranks: int) -> None:
        """seed, rank, ranks: what is drawn for a sample follows from these, the pass, and its place in the stream."""
        self._dataset, self._collate = dataset, collate
        self._seeds = SampleSeeds(seed)
        self._rank, self._ranks = rank, ranks
        self._at = Position()
        self._iterator: Iterator[Any] | None = None
        self.begun = False
        """Whether `begin` was called."""
        self._step = -1
        self._batches: dict[tuple[int, int], Any] = {}
        """Of the newest step, by the number of the part, and of the batch in it."""

    def fetcher(self, device: torch.device) -> Fetcher:
        """Puts its batches on the device; by numbers it has none."""

        def load(numbers: NDArray[np.int64], epoch: int) -> Any:
            raise NotImplementedError("a stream has no samples by number")

        return Fetcher(load, device, by_sample=True)

    @property
    def stateful(self) -> bool:
        """Whether the data set can go on in the middle: by state_dict and load_state_dict, as torchdata's StatefulDataLoader asks for."""
        return all(callable(getattr(self._dataset, name, None)) for name in ("state_dict", "load_state_dict"))

    @property
    def next_step(self) -> int:
        """The step after the one that was read last."""
        return self._step + 1

    def take(self, part: BatchPart) -> Any:
        """The batch of a part, on the CPU. Parts are taken step by step; those of the newest step as often as wanted."""
        if part.step != self._step:
            self._step, self._batches = part.step, {}
        key = part.index, part.batch
        if key not in self._batches:
            self._batches[key] = guarded_batch(lambda: self._read(part.samples), self._collate)
        return self._batches[key]

    def position(self) -> Position:
        """Where it is, for `begin`. Only of a data set that is stateful, between two steps."""
        return replace(self._at, state=self._dataset.state_dict())

    def begin(self, position: Position | None, *, skip: int, step: int) -> None:
        """Goes on from a position, `skip` samples after it, with this step; None: from the beginning."""
        self.begun = True
        self._at, self._iterator = position or Position(), None
        self._step, self._batches = step - 1, {}
        if position is not None:
            self._dataset.load_state_dict(position.state)
        for _ in range(skip):
            guarded_batch(lambda: [self._next()], lambda _: None)

    def _read(self, count: int) -> list[Any]:
        return [self._next() for _ in range(count)]

    def _next(self) -> Any:
        """The next sample. Raises UserError for a stream without samples."""
        while True:
            if self._iterator is None:
                if callable(set_epoch := getattr(self._dataset, "set_epoch", None)):
                    set_epoch(self._at.passes)
                self._iterator = iter(self._dataset)
            self._seeds.begin(self._at.passes + 1)
            self._seeds.set(self._at.taken * self._ranks + self._rank)
            try:
                sample = next(self._iterator)
            except StopIteration:
                if not self._at.taken:
                    raise UserError(
                        f"trainer.dataset gave no sample to rank {self._rank} of {self._ranks}: an iterable data set must have "
                        "some for each"
                    ) from None
                self._at, self._iterator = Position(passes=self._at.passes + 1), None
                continue
            self._at = Position(self._at.passes, self._at.taken + 1)
            return sample
