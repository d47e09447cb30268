"""What the first rank of a group tells the others to do next, so that all take the same steps in the same order.

Every operation in which the ranks of a group wait for one another follows from an order, and each order is followed by all: a round that
ends, on whichever rank that is seen first, ends between two of them, and the process group stays as it is. The first rank says something
once a second at least, so that no wait for it runs into a time-out.
"""

import json
from collections.abc import Callable
from enum import IntEnum, auto
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from disttrain_trainer.errors import PeerLost

SIGN_OF_LIFE_SECONDS = 1.0
"""Between two orders of a first rank that waits."""


class Order(IntEnum):
    """What comes next."""

    NOTHING = auto()
    """The group waits: no other worker waits for it."""
    ENTER = auto()
    """The round that a text describes."""
    PART = auto()
    """The part of this number."""
    COLLECT = auto()
    """The buffers of all ranks, to be saved."""
    BETWEEN = auto()
    """An evaluation of the parameters of this step, while other groups train on."""
    EVALUATE = auto()
    """The parameters after the last step."""
    LEAVE = auto()
    """The round is over."""
    END = auto()
    """The job is done."""


class Told(NamedTuple):
    """One order."""

    order: Order
    number: int = 0
    following: int = -1
    """The part after it; -1 where that is not known."""


class Orders:
    """For the main thread of one rank. Calls block until all ranks of the group have made them, and raise RuntimeError when one is lost."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.leads = dist.get_rank() == 0

    def tell(self, order: Order, number: int = 0, following: int = -1) -> Told:
        """The first rank: this comes next."""
        dist.broadcast(torch.tensor([order, number, following], device=self._device), 0)
        return Told(order, number, following)

    def hear(self) -> Told:
        """The others: what comes next."""
        told = torch.zeros(3, dtype=torch.int64, device=self._device)
        dist.broadcast(told, 0)
        order, number, following = told.tolist()
        return Told(Order(order), number, following)

    def share(self, value: Any = None) -> Any:
        """What the first rank gives, which JSON can hold, on every rank."""
        data = json.dumps(value).encode() if self.leads else b""
        return json.loads(self.collect(data)[0])

    def collect(self, own: bytes) -> list[bytes]:
        """What each rank gives, on every rank."""
        size = dist.get_world_size()
        lengths = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(size)]
        dist.all_gather(lengths, torch.tensor([len(own)], device=self._device))
        found = []
        for rank, length in enumerate(lengths):
            data = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
            if rank == dist.get_rank() and own:
                data.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
            if len(data):
                dist.broadcast(data, rank)
            found.append(data.cpu().numpy().tobytes())
        return found

    def count(self, *numbers: float) -> list[float]:
        """The sums over the ranks."""
        sums = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        return list(sums.tolist())

    def together(self, work: Callable[[], float]) -> float:
        """Does work with the servers on every rank; the sum of what it gives. Raises PeerLost on all of them when one of them raised it."""
        own, failure = 0.0, None
        try:
            own = work()
        except PeerLost as error:
            failure = error
        failures, total = self.count(failure is not None, own)
        if failure is not None:
            raise failure
        if failures:
            raise PeerLost("the parameter servers", "another process of this group has lost them, or its round is over")
        return total
