"""A worker's steps of its own between two exchanges: strategy.parameterServer.localSteps. Local SGD, and DiLoCo (arXiv 2311.08105).

A worker starts from the servers' parameters, takes a step of trainer.optimizer on each batch of its part, and pushes how far it has come:
start - end. The servers take the mean over the parts of the step for the gradient of their outer optimiser. The inner optimiser's state
goes on from part to part; it lies here alone, so that the process that replaces this one begins without it.
"""

from collections.abc import Sequence

import torch

from disttrain.api.optimizer import Optimizer as Settings
from disttrain_trainer.checkpoint import tensors
from disttrain_trainer.data.inner_batches import inner_batches
from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.model import clipping
from disttrain_trainer.model.flat import FlatModel, Vectors, norm
from disttrain_trainer.model.learning_rate import LearningRate
from disttrain_trainer.model.optimizers import FlatOptimizer


class LocalSteps:
    """Of one worker process. For the training thread."""

    def __init__(
        self,
        model: FlatModel,
        optimizer: Settings,
        *,
        steps: int,
        full: int,
        clip: float | None = None,
        learning_rate: LearningRate | None = None,
    ) -> None:
        """steps: of a part. full: samples of a part of a full step. clip: the largest norm of a step's gradient; None: any. learning_rate:
        that of the steps of the job, which the local steps of a part all have; None: constant."""
        self._model = model
        self._optimizer = FlatOptimizer(optimizer, model)
        self._steps, self._full = steps, full
        self._clip = clip
        self.wants_norm = True
        """Whether `norm` is to be that of the next step, also without a clip."""
        self.norm: float | None = None
        """Of the gradient of the newest step of which it is known, before the clip."""
        self._learning_rate = learning_rate
        self._rate = 1.0
        self._start = tuple(torch.empty_like(vector) for vector in model.parameters)
        """The parameters at the beginning of the part, and then the change."""
        self._took: list[bool] | None = []
        """Which parameters had a gradient in one of the steps; None: all."""
        self._weight = 0.0
        self._is_weighed = False
        """Whether the loss says what its means weigh."""
        self._newest: float = 0.0

    @property
    def began_finite(self) -> bool:
        """Whether the parameters were finite at the beginning of the part: else it is not one of its own steps that made them so."""
        return all(map(tensors.is_finite, self._start))

    def reset(self) -> None:
        """The servers went back to a checkpoint: the optimiser begins as in a new process."""
        state = self._optimizer.state()
        for vectors in state.values():
            for vector in vectors:
                vector.zero_()
        self._optimizer.restore(state.get("updates", ()))

    def begin(self, part: BatchPart) -> Sequence[BatchPart]:
        """The model has the servers' parameters. Returns the batches of the part."""
        for start, vector in zip(self._start, self._model.parameters, strict=True):
            start.copy_(vector)
        self._rate = self._learning_rate.factor(part.step) if self._learning_rate is not None else 1.0
        self._took = [False] * len(self._model.places)
        self._weight, self._is_weighed = 0.0, False
        return inner_batches(part, self._steps, self._full) if part.samples else (part,)

    def weigh(self, batch: BatchPart, weight: float | None) -> None:
        """The next step is with this batch. weight: what the loss says that its mean weighs."""
        self._is_weighed = self._is_weighed or weight is not None
        self._newest = batch.samples if weight is None else weight
        self._weight += self._newest

    def step(self) -> None:
        """The gradient of a batch is there: takes a step with it."""
        if not self._newest:
            return  # of weight 0: it has no gradient
        gradients, took = self._model.gradients(), self._model.took_part
        if self._clip is not None:
            self.norm = clipping.clip(gradients, self._clip)
        elif self.wants_norm:
            self.norm, self.wants_norm = norm(gradients), False
        self._optimizer.step(gradients, took, rate=self._rate)
        self._model.zero_grad()
        if self._took is not None:
            self._took = None if took is None else [one or other for one, other in zip(self._took, took, strict=True)]

    def change(self) -> tuple[Vectors, list[bool] | None, float | None]:
        """The end of the part: start - end; which parameters took part, None: all; what the part weighs, None: its samples.

        The vectors are used again for the next part.
        """
        for start, vector in zip(self._start, self._model.parameters, strict=True):
            start.sub_(vector)
        took = self._took if self._took is not None and not all(self._took) else None
        return self._start, took, self._weight if self._is_weighed else None
