"""The model in torch's DistributedDataParallel, so that a lost peer can be told from the user's own mistake.

DDP raises both as a RuntimeError out of backward. Here a communication hook does the sums: what breaks in it is kept, backward goes
on, and `check` raises BrokenGroup. Not here: process groups (group.py), weights of samples (the loop scales the loss).
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket, Work  # type: ignore[attr-defined]  # missing in their __all__
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from disttrain_trainer.errors import UserError
from disttrain_trainer.parallel.group import BrokenGroup, Wires

GLANCE = 20e-6
"""Seconds between two looks at whether a GPU has its sums."""


class Replica:
    """One rank's model, whose gradients become the sum over all ranks while backward still runs."""

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[[Any], torch.Tensor],
        *,
        wires: Wires,
        deterministic: bool = False,
    ) -> None:
        """objective: the loss of a batch, which `module` then computes. deterministic: a step's sums do not depend on the steps before."""
        self._model = model
        self._wires = wires
        self._error: RuntimeError | None = None
        self._whole = False
        """Whether the last bucket was sent: every parameter had its gradient."""
        self._works: list[Work] = []
        self.sent = 0.0
        """When the newest bucket was sent, of time.perf_counter: what follows the last one in backward is waiting."""
        # The newest rank has just sent its state to all, and buffers are those of rank 0 in every checkpoint and evaluation.
        with warnings.catch_warnings():
            # torch 2.15 deprecates it for a name that older ones lack, and that sends the buffers once more.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self.module = DistributedDataParallel(
                _Loss(model, objective),
                init_sync=False,
                broadcast_buffers=False,
                # With it the buckets stay as they are, where DDP would order them anew after the first step, and a training that is
                # resumed would add up in another order than one that is not.
                find_unused_parameters=deterministic,
            )
        self.module.register_comm_hook(None, self._reduce)

    def check(self) -> None:
        """After each backward. Raises BrokenGroup when a peer was lost in it, and UserError when a parameter took no part in it."""
        if error := self._error or self._wires.error:
            raise BrokenGroup(error) from None
        if not self._whole:
            idle = [name for name, p in self._model.named_parameters() if p.requires_grad and not _moved(p)]
            raise UserError(
                f"a parameter got no gradient, such as {', '.join(idle[:3]) or 'one of a part that was not used'}: with strategy "
                "DataParallel each one must take part in every loss; freeze it with requires_grad = False"
            )
        self._whole = False

    def settle(self, alive: Callable[[], bool]) -> None:
        """On a GPU, after `check`: waits until the sums are there. Raises BrokenGroup when the world ended before.

        An aborted sum ends as if it were done, with whatever it had added up so far: an optimiser's step that was queued behind it
        would make of it the newest state of all.
        """
        works, self._works = self._works, []
        while alive() and not all(work.is_completed() for work in works):
            time.sleep(GLANCE)
        for work in works:
            if (error := work.exception()) is not None:
                raise BrokenGroup(str(error))
        if not alive():
            raise BrokenGroup("it ended within a step")

    def _reduce(self, _: None, bucket: GradBucket) -> Future[torch.Tensor]:
        vector = bucket.buffer()
        self._whole = self._whole or bucket.is_last()
        if self._error is None and self._wires.error is None:
            try:
                work = dist.all_reduce(vector, async_op=True)
                assert work is not None
                self.sent = time.perf_counter()
                if not vector.is_cuda:
                    return self._wires.awaited(work, vector)
                self._works.append(work)
                return work.get_future().then(lambda future: self._sum(future, vector))
            except RuntimeError as error:
                self._error = error
        self.sent = time.perf_counter()
        unsummed: Future[torch.Tensor] = Future()
        unsummed.set_result(vector)
        return unsummed

    def _sum(self, future: Future[list[torch.Tensor]], vector: torch.Tensor) -> torch.Tensor:
        try:
            future.wait()
        except RuntimeError as error:
            self._error = error
        return vector


class _Loss(nn.Module):
    """The user's model and loss as one module, so that the loss has the model that the user made, and may call any part of it."""

    def __init__(self, model: nn.Module, objective: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Any) -> torch.Tensor:
        return self._objective(batch)


def _moved(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())
