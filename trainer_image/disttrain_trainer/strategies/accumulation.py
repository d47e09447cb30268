"""The gradient of a part as the sum of those of its portions: trainer.gradientAccumulationSteps, for a worker of parameter servers."""

from collections.abc import Sequence

import torch

from disttrain_trainer.data.inner_batches import Portions
from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.model.flat import FlatModel, Vectors


class Accumulation:
    """Of one worker process. For the training thread.

    The servers get the mean over the part. A portion counts by its samples, or by what the loss says that its mean weighs. What the
    portions weigh together is known after the last one, so that the sum is divided then.
    """

    def __init__(self, model: FlatModel, portions: Portions) -> None:
        self._model = model
        self._portions = portions
        self._samples = 0
        self._total = 0.0
        self._is_weighed = False

    def begin(self, part: BatchPart) -> Sequence[BatchPart]:
        """The portions of a part."""
        self._samples, self._total, self._is_weighed = part.samples, 0.0, False
        return self._portions.of(part)

    def weigh(self, loss: torch.Tensor, portion: BatchPart, weight: float | None) -> torch.Tensor:
        """The loss x its share. weight: what the loss says that its mean weighs; None: its samples."""
        if portion.batch:
            self._model.refuse_cleared()
        self._is_weighed = self._is_weighed or weight is not None
        counts = portion.samples if weight is None else weight
        self._total += counts
        return loss * (counts / self._samples)

    def after(self, portion: BatchPart) -> None:
        """The gradient of a portion is there: what user code has replaced is put into its place, for the next one to be added."""
        if not portion.is_last:
            self._model.gradients()

    def mean(self, gradients: Vectors) -> float | None:
        """After the last portion: makes the sum the mean, in place. Returns what the part weighs; None: its samples."""
        if not self._is_weighed:
            return None
        if self._total:
            for vector in gradients:
                vector.mul_(self._samples / self._total)
        return self._total
