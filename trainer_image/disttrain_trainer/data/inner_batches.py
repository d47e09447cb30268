"""The batches into which a worker cuts its part of a step: for local steps, and for gradient accumulation. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from disttrain.api.runtime import JobConfig
from disttrain_trainer.data.schedule import BatchPart


class Portions:
    """The portions of a part whose gradients add up: trainer.gradientAccumulationSteps. Safe to share between threads."""

    def __init__(self, config: JobConfig) -> None:
        self.count = config.trainer.gradient_accumulation_steps
        """Of a part of a full step; a part of fewer samples may have fewer."""
        self._full = config.trainer.batch_size // config.parts_per_step

    def of(self, part: BatchPart) -> Sequence[BatchPart]:
        """Near-equal consecutive portions of the part; the part itself where it has no samples."""
        return inner_batches(part, self.count, self._full) if self.count > 1 and part.samples else (part,)


def inner_batches(part: BatchPart, steps: int, full: int) -> list[BatchPart]:
    """The part in near-equal consecutive batches, each with at least one sample: `steps`, or as many as there are samples.

    full: samples of a part of a full step. Where those give each batch two samples or more, so does a smaller part, and has fewer batches:
    BatchNorm cannot train on one sample.
    """
    each = 2 if full >= 2 * steps else 1
    count = max(1, min(steps, part.samples // each))
    cuts = [part.samples * number // count for number in range(count + 1)]
    return [
        replace(
            part,
            samples=cuts[batch + 1] - cuts[batch],
            indices=part.indices[cuts[batch] : cuts[batch + 1]],
            batch=batch,
            is_last=batch + 1 == count,
        )
        for batch in range(count)
    ]
