"""The batches of a job, cut into numbered parts. Pure: no torch, no I/O, no clock.

A global batch is `batch_size` consecutive samples of the order of an epoch (`order.py`); `last_batch` says what becomes of the remainder.
It is cut into `parts_per_step` near-equal consecutive parts. Parts are numbered 0, 1, 2 … across the whole job, so that part k
belongs to step k // parts_per_step; the number is the key by which a part is assigned, counted and applied exactly once.

A model with BatchNorm cannot train on one sample. Where every full batch gives each part two samples or more, so does the remainder:
a single sample joins the batch before it, and a smaller batch is cut into fewer parts, the others of its step being empty.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disttrain.api.runtime import JobConfig
from disttrain.api.trainer import LastBatch
from disttrain_trainer.data.order import TABLE, KeyedPermutation, Order

BLOCK = 4096
"""Positions of an epoch whose order is computed at once, for the parts to come: a call of numpy costs as much as a hundred of them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchPart:
    """The unit of work: samples whose mean loss gives one gradient."""

    index: int
    """The part's number in the job."""
    step: int
    """The step it belongs to, from 0."""
    epoch: int
    """The epoch, from 1."""
    samples: int
    """Samples of the part. 0 when the batch has fewer samples than parts: nothing to compute, but to be counted as applied."""
    batch_samples: int
    """Samples of the whole step; the part's gradient counts samples / batch_samples in a synchronous step."""
    indices: NDArray[np.int64]
    """The samples' numbers in the dataset, shape (samples,), read-only."""
    batch: int = 0
    """The number of this batch in the part, where that is cut into some (inner_batches.py): local steps, gradient accumulation."""
    is_last: bool = True
    """Whether it is the last batch of the part."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """The identity of a data set: two with the same samples in the same order are equal."""

    samples: int
    fingerprint: str | None = None
    """The data set's own fingerprint of its content; None when it has none."""
    order: str = KeyedPermutation.name
    """The name of the order of its epochs."""

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> "DataSet":
        """The data set of a worker, as its message to the master describes it. A worker of an earlier release names no order."""
        return cls(int(message["samples"]), message.get("fingerprint"), message.get("order") or TABLE)

    def difference(self, others: "DataSet") -> str:
        """How this data set differs from the others', as text."""
        if self.samples != others.samples:
            return f"{self.samples} training samples, others have {others.samples}"
        if self.order != others.order:
            return f"the order {self.order} of an epoch, others have {others.order} (all images must be of one release)"
        return f"a data set of fingerprint {self.fingerprint}, others have one of {others.fingerprint}"


class Schedule:
    """Every part of a job, as a function of its number. Safe to share between threads.

    Exactly one of `epochs` and `max_steps`. order: that of the data set's layout; None for map-style data. It depends on seed and epoch
    alone: no history is needed to go on in the middle. The batches do not depend on `parts_per_step`. Raises ValueError for numbers
    that make no schedule.
    """

    def __init__(
        self,
        *,
        samples: int,
        batch_size: int,
        parts_per_step: int,
        seed: int,
        epochs: int | None = None,
        max_steps: int | None = None,
        last_batch: LastBatch = LastBatch.KEEP,
        order: Order | None = None,
    ) -> None:
        if min(samples, batch_size, parts_per_step) < 1 or seed < 0:
            raise ValueError(
                f"samples ({samples}), batch_size ({batch_size}) and parts_per_step ({parts_per_step}) must be at least 1, "
                f"seed ({seed}) at least 0"
            )
        limit = epochs if max_steps is None else max_steps
        if limit is None or (epochs is not None and max_steps is not None) or limit < 1:
            raise ValueError(f"set exactly one of epochs ({epochs}) and max_steps ({max_steps}), at least 1")
        self.samples = samples
        self.batch_size = batch_size
        self.parts_per_step = parts_per_step
        self.seed = seed
        self.steps_per_epoch = steps_per_epoch(samples, batch_size, last_batch)
        if not self.steps_per_epoch:
            raise ValueError(f"samples ({samples}) fill no batch of batch_size ({batch_size}), and last_batch is Drop")
        self.left_out = samples - self.steps_per_epoch * batch_size if last_batch is LastBatch.DROP else 0
        """Samples of each epoch that are in no batch."""
        self.total_steps = limit if epochs is None else limit * self.steps_per_epoch
        self.total_parts = self.total_steps * parts_per_step
        self.without_parts: frozenset[int] = frozenset()
        """Parts that have no samples, since they led to a loss that was not finite (trainer.nanPolicy)."""
        self._last_batch = last_batch
        self._plain = {LastBatch.KEEP: self.steps_per_epoch - 1, LastBatch.DROP: self.steps_per_epoch}.get(
            last_batch, 0
        )
        """Batches before this one have `batch_size` samples."""
        self._cuts: dict[int, list[int]] = {}
        self._order = order or KeyedPermutation(samples, seed)
        self._ahead = BLOCK // batch_size if 2 * batch_size <= BLOCK else 0
        """Batches whose order is computed at once; 0: that of each part by itself."""
        self._block: tuple[int, int, NDArray[np.int64]] = -1, 0, np.empty(0, np.int64)
        """The epoch, the first position and the samples of the block that was computed last."""

    @classmethod
    def of(cls, config: JobConfig, samples: int, order: Order | None = None) -> "Schedule":
        """The schedule of a job over a data set of so many samples. Raises ValueError when lastBatch leaves no batch.

        order: as of the class. Who asks for no samples, as the master, needs none.
        """
        trainer = config.trainer
        return cls(
            samples=samples,
            batch_size=trainer.batch_size,
            parts_per_step=config.parts_per_step,
            seed=trainer.seed,
            epochs=trainer.epochs,
            max_steps=trainer.max_steps,
            last_batch=trainer.last_batch,
            order=order,
        )

    def part(self, index: int) -> BatchPart:
        """Part `index` of the job. Raises IndexError outside [0, total_parts)."""
        if not 0 <= index < self.total_parts:
            raise IndexError(f"part {index} of {self.total_parts}")
        step, number = divmod(index, self.parts_per_step)
        epoch, batch = divmod(step, self.steps_per_epoch)
        if batch < self._plain:  # nearly always, and each microsecond is a per cent of a small model's step
            start, batch_samples = batch * self.batch_size, self.batch_size
        else:
            start, batch_samples = self._bounds(batch)
        cuts = self._cuts.get(batch_samples) or self._cut(batch_samples)
        low, high = start + cuts[number], start + cuts[number + 1]
        if self.without_parts and index in self.without_parts:
            high = low
        return BatchPart(
            index=index,
            step=step,
            epoch=epoch + 1,
            samples=high - low,
            batch_samples=batch_samples,
            indices=self._samples_at(epoch, low, high, batch_start=start),
        )

    def _samples_at(self, epoch: int, low: int, high: int, *, batch_start: int) -> NDArray[np.int64]:
        """The samples at the positions [low, high) of an epoch, read-only."""
        of, first, block = self._block
        if of != epoch or low < first or high > first + len(block):
            first, stop = low, high
            if self._ahead:
                first = batch_start
                stop = max(high, min(first + self._ahead * self.batch_size, self.samples))
            block = self._order(epoch, np.arange(first, stop))
            block.setflags(write=False)
            self._block = epoch, first, block  # at once: other threads read it
        return block[low - first : high - first]

    def _bounds(self, batch: int) -> tuple[int, int]:
        """Where a batch begins in the order of its epoch, and how many samples it has."""
        if self._last_batch is LastBatch.SPREAD:
            size, larger = divmod(self.samples, self.steps_per_epoch)
            first_larger = self.steps_per_epoch - larger
            return batch * size + max(0, batch - first_larger), size + (batch >= first_larger)
        start = batch * self.batch_size
        is_remainder = self._last_batch is LastBatch.KEEP and batch == self.steps_per_epoch - 1
        return start, self.samples - start if is_remainder else self.batch_size

    def _cut(self, batch_samples: int) -> list[int]:
        """Where the parts of a batch of this size begin and end, parts_per_step + 1 numbers from 0 on. The first parts are filled first.

        See the module's docstring for why not always all of them get samples.
        """
        each = 2 if self.batch_size >= 2 * self.parts_per_step else 1
        filled = max(1, min(self.parts_per_step, batch_samples // each))
        cuts = [batch_samples * min(part, filled) // filled for part in range(self.parts_per_step + 1)]
        self._cuts[batch_samples] = cuts  # of few sizes: a full batch, and the last one
        return cuts


def parts_of(rank: int, *, ranks: int, parts_per_step: int) -> range:
    """The parts of a step, counted from 0, that a rank of a collective computes: neighbours, as many as any other rank has or one less.

    Rank 0 has part 0. A rank has none when there are more ranks than parts.
    """
    return range(-(-rank * parts_per_step // ranks), -(-(rank + 1) * parts_per_step // ranks))


def steps_per_epoch(samples: int, batch_size: int, last_batch: LastBatch) -> int:
    """The number of global batches in an epoch; 0 when Drop leaves none."""
    full, remainder = divmod(samples, batch_size)
    match last_batch:
        case LastBatch.DROP:
            return full
        case LastBatch.SPREAD:
            return max(1, full)
        case LastBatch.KEEP:
            joins = remainder == 1 and full > 0
            return full + (remainder > 0 and not joins)
