"""What a strategy adds to the loop."""

from collections.abc import Sequence
from typing import Protocol

import torch

from disttrain_trainer.data.schedule import BatchPart


class Exchange(Protocol):
    """How one process keeps its model in step with the others', for one round. The loop calls its methods in this order:

        while parts := next_parts():
            for each part that `before` gives:  the loss;  backward of what `weigh` gives;  after
            complete
            step_done

    Its methods are the training thread's. The stopwatch of the loop: `next_parts` starts it when there are parts; the loop counts data,
    forward and backward of each part; `complete` counts what it does, such as communicate and optimize.
    """

    def next_parts(self) -> Sequence[BatchPart]:
        """The parts whose gradients go into the next exchange; none when the training, or the round, is over. The model's parameters are
        those that the parts start from. May wait for the parts, and for the parameters."""

    def before(self, part: BatchPart) -> BatchPart | None:
        """The model's buffers are those that the part starts from. Returns what is to be computed; None: nothing."""

    def weigh(self, loss: torch.Tensor, part: BatchPart, weight: float | None) -> torch.Tensor | None:
        """The scalar whose gradient is what this strategy adds up; None where backward would compute nothing that counts.

        weight: what the user's loss returned with the mean; None: the mean is over samples.
        """

    def after(self, part: BatchPart) -> None:
        """The gradient of the part has been added to the model's."""

    def complete(self) -> bool:
        """Exchanges the gradients. False when they had a weight, and reached no parameter: nothing was learned."""

    def step_done(self, *, reported: bool) -> None:
        """After a step: saves what is due, and raises what went wrong meanwhile. reported: the step was reported to the master."""
