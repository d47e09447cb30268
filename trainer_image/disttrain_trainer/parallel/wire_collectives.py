"""The collectives of one group over connections of ours: one thread carries them out, in the order in which they were called.

Every rank exchanges with every other one directly: a sum over n ranks is n - 1 parts that come and n - 1 that go, twice, which are the
bytes of a ring in two steps. Sums are made in the order of the ranks, each by one rank, so that all ranks have the same bits, and so has a
second run.
"""

import queue
import threading
from collections.abc import Callable
from typing import Final

import torch

from disttrain_trainer.model.flat import bytes_of
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.operation import Operation
from disttrain_trainer.parallel.wire import HEAD, SMALL, Wire
from disttrain_trainer.parallel.wire_mailbox import lost
from disttrain_trainer.parallel.wire_tensors import PIECE, Combine, copy, pieces

NAMES: Final = (
    "allreduce",
    "broadcast",
    "reduce",
    "allgather",
    "reduce_scatter",
    "gather",
    "scatter",
    "alltoall",
    "barrier",
)


class Collectives:
    """What the operations of a rank are made of. All but `start` and `finish` are for its thread."""

    def __init__(self, wire: Wire, *, rank: int, size: int) -> None:
        self._wire = wire
        self._rank, self._size = rank, size
        self._peers = wire.peers
        self._broken: BrokenGroup | None = None
        self._number = 0
        """Of the collective that is carried out."""
        self._kind = 0
        self._stages = [torch.empty(0, dtype=torch.uint8)] * 2
        self._queue: queue.SimpleQueue[tuple[str, Operation, Callable[[Operation], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="collectives", daemon=True)
        self._thread.start()

    def start(self, kind: str, operation: Operation, run: Callable[[Operation], None]) -> None:
        """Has the thread call `run` when all before it are done. kind: one of NAMES. Does not block."""
        self._queue.put((kind, operation, run))

    def finish(self) -> None:
        """Blocks until all are done, and ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            kind, operation, run = item
            self._number, self._kind = self._number + 1, NAMES.index(kind)
            try:
                if self._broken is None:
                    run(operation)
            except Exception as error:  # the peers are in the middle of it, too: nothing that follows could fit
                self._broken = BrokenGroup(error)
            operation.end_part(self._broken)
            del item, operation, run  # their tensors live no longer than needed

    def give(self, operation: Operation, peer: int, vector: torch.Tensor) -> None:
        """Sends a vector to a peer, which takes it by the same operation."""
        head = HEAD.pack(self._number, self._kind, vector.nbytes)
        self._wire.outgoing[peer].send(head, bytes_of(vector), operation, now=True)

    def take(self, peer: int, vector: torch.Tensor) -> None:
        """Receives what the peer gives by the same operation. Raises BrokenGroup."""
        self._take_head(peer, vector.nbytes)
        self._fill(peer, vector)

    def _take_head(self, peer: int, nbytes: int) -> None:
        try:
            number, kind, size = self._wire.incoming[peer].head()
        except OSError as error:
            raise lost(peer, error) from None
        if (number, kind, size) != (self._number, self._kind, nbytes):
            raise BrokenGroup(
                f"rank {peer} is at collective {number}, {NAMES[kind]}, with {size} bytes, where rank {self._rank} is at {self._number}, "
                f"{NAMES[self._kind]}, with {nbytes}: all ranks must call the same operations on tensors of the same size"
            )

    def _fill(self, peer: int, vector: torch.Tensor) -> None:
        try:
            self._wire.incoming[peer].fill(bytes_of(vector))
        except OSError as error:
            raise lost(peer, error) from None

    def sum_everywhere(self, operation: Operation, vector: torch.Tensor, combine: Combine, mean: int) -> None:
        """Adds the vectors of all ranks up, in place on all of them. mean: what the sum is divided by."""
        if vector.nbytes <= SMALL:  # one step: each rank adds all up
            for peer in self._peers:
                self.give(operation, peer, vector)
            self.fold(vector, vector, combine, mean)
            return
        parts = [part.view(-1) for part in vector.tensor_split(self._size)]
        for peer in self._peers:
            self.give(operation, peer, parts[peer])

        def give_to_all(piece: torch.Tensor) -> None:
            for peer in self._peers:
                self.give(operation, peer, piece)

        # A peer sends back a part only when it has all of it from this rank: nothing that is still to be sent is overwritten.
        own = parts[self._rank]
        self.fold(own, own, combine, mean, give_to_all)
        for peer in self._peers:
            for piece in pieces(parts[peer]):
                self.take(peer, piece)

    def fold(
        self,
        own: torch.Tensor,
        out: torch.Tensor,
        combine: Combine,
        mean: int,
        done: Callable[[torch.Tensor], None] = lambda _: None,
    ) -> None:
        """Adds the parts of all ranks up into `out`, in the order of the ranks. mean: what the sum is divided by. done: called with each
        piece of it."""
        for peer in self._peers:
            self._take_head(peer, own.nbytes)
        if not self._stages[0].numel():
            self._stages = [torch.empty(PIECE, dtype=torch.uint8) for _ in range(2)]
        stages = [stage.view(own.dtype) for stage in self._stages]
        for mine, result in zip(pieces(own), pieces(out), strict=True):
            total: torch.Tensor | None = None
            for rank in range(self._size):
                if rank != self._rank:
                    piece = stages[total is not None][: mine.numel()]
                    self._fill(rank, piece)
                    if total is not None:
                        combine(total, piece, total)
                    else:
                        total = piece
                elif total is not None:
                    combine(total, mine, result)
                    total = result
                else:
                    copy(mine, result)
                    total = result
            if mean > 1:
                result.div_(mean)
            done(result)

    def spread(self, operation: Operation, vector: torch.Tensor, root: int) -> None:
        """To few or little at once; else each of the others gets a part from the root, and gives it to the rest."""
        others = [rank for rank in range(self._size) if rank != root]
        if len(others) < 2 or vector.nbytes <= SMALL:
            if self._rank == root:
                for peer in self._peers:
                    self.give(operation, peer, vector)
            else:
                self.take(root, vector)
            return
        parts = dict(zip(others, vector.tensor_split(len(others)), strict=True))
        if self._rank == root:
            for peer in self._peers:
                self.give(operation, peer, parts[peer])
            return
        own = parts[self._rank]
        self._take_head(root, own.nbytes)
        for piece in pieces(own):
            self._fill(root, piece)
            for peer in self._peers:
                if peer != root:
                    self.give(operation, peer, piece)
        for peer in self._peers:
            if peer != root:
                for piece in pieces(parts[peer]):
                    self.take(peer, piece)
