"""c10d's backend `disttrain` under TLS, which gloo does not have: the same operations, over connections of ours (`wire`).

One thread carries out the collectives of a group, in the order in which they were called. Every rank exchanges with every other one
directly: a sum over n ranks is n - 1 parts that come and n - 1 that go, twice, which are the bytes of a ring in two steps. Sums are made in
the order of the ranks, each by one rank, so that all ranks have the same bits, and so has a second run.

A message goes with a tag, and comes into the tensor that waits for it, or into memory until one does. A lost peer closes its connections,
which ends the waits for it; `close` ends all, at once: no operation needs more than its connection.
"""

import queue
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import Work

from disttrain_trainer.model.flat import bytes_of
from disttrain_trainer.net.transport import Transport
from disttrain_trainer.parallel.backend import ENDED, NAME, BrokenGroup, RoundBackend, RoundEnd
from disttrain_trainer.parallel.operation import Operation
from disttrain_trainer.parallel.traffic import Traffic
from disttrain_trainer.parallel.wire import HEAD, SMALL, Receiver, Sender, Use, Wire

PIECE: Final = 512 << 10
"""Bytes that are read and added at once: they stay in the processor's cache in between."""
Tensors = Sequence[torch.Tensor]
Combine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""Puts one of two into a third."""


def _into(function: Callable[..., object]) -> Combine:
    return lambda one, other, out: function(one, other, out=out)


_Op: Final[Any] = dist.ReduceOp.RedOpType
_COMBINE: Final[dict[Any, Combine]] = {
    _Op.SUM: _into(torch.add),
    _Op.AVG: _into(torch.add),
    _Op.PRODUCT: _into(torch.mul),
    _Op.MIN: _into(torch.minimum),
    _Op.MAX: _into(torch.maximum),
    _Op.BAND: _into(torch.bitwise_and),
    _Op.BOR: _into(torch.bitwise_or),
    _Op.BXOR: _into(torch.bitwise_xor),
}
_NAMES: Final = (
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


class WireBackend(RoundBackend):
    """One group of ranks of one round. c10d calls its operations by the names below, with their arguments in this order."""

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        transport: Transport,
        host: str,
        timeout: timedelta,
        round_end: RoundEnd,
        traffic: Traffic,
    ) -> None:
        """host: the address of this machine that the peers reach. timeout: of an operation. `connect` comes next."""
        super().__init__(rank, size, c10d.Backend.Options(NAME, timeout), round_end=round_end, traffic=traffic)
        self._seconds = timeout.total_seconds()
        self._broken: BrokenGroup | None = None
        self._mailbox = _Mailbox()
        self._wire = Wire(
            transport=transport,
            host=host,
            rank=rank,
            size=size,
            timeout=self._seconds,
            on_messages=self._mailbox.fill,
        )
        self._peers = self._wire.peers
        self._senders: dict[int, Sender] = {}
        """Of messages, by peer."""
        self._number = 0
        """Of the collective that is carried out."""
        self._kind = 0
        self._stages = [torch.empty(0, dtype=torch.uint8)] * 2
        self._queue: queue.SimpleQueue[tuple[str, Operation, Callable[[Operation], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="collectives", daemon=True)
        self._thread.start()

    @property
    def place(self) -> str:
        """Where the peers find this rank: for `connect` of each."""
        return self._wire.place

    def connect(self, places: list[str]) -> None:
        """Connects with the ranks at these places. Raises BrokenGroup."""
        try:
            self._wire.connect(places)
        except OSError as error:
            raise BrokenGroup(error) from None

    def close(self) -> None:
        """Closes the connections, so that the waits of all ranks in this group end. From any thread; it does not block."""
        self._wire.close()
        self._mailbox.close(BrokenGroup(ENDED))

    def release(self) -> None:
        """Carries out what is left, then closes the sockets and ends the threads; blocks until then."""
        self._queue.put(None)
        self._thread.join()
        for sender in self._senders.values():
            sender.finish()
        self._wire.release()
        self._mailbox.close(BrokenGroup(ENDED))

    # The operations. What torch may change once a call has returned is read here, not in the thread.

    def allreduce(self, tensors: Tensors, options: Any) -> Work:
        return self._all_reduce("allreduce", tensors, options)

    def allreduce_coalesced(self, tensors: Tensors, options: Any) -> Work:
        return self._all_reduce("allreduce_coalesced", tensors, options)

    def _all_reduce(self, name: str, tensors: Tensors, options: Any) -> Work:
        combine, mean, flat = _combine(options), self._mean(options), _Flat()
        vectors = [flat(tensor, written=True) for tensor in tensors]

        def run(operation: Operation) -> None:
            for vector in vectors:
                self._sum_everywhere(operation, vector, combine, mean)
            flat.finish()

        return self._start(name, "allreduce", (tensors, options), tensors, run)

    def broadcast(self, tensors: Tensors, options: Any) -> Work:
        root, flat = options.rootRank, _Flat()
        vectors = [flat(tensor, written=self._rank != root) for tensor in tensors]

        def run(operation: Operation) -> None:
            for vector in vectors:
                self._spread(operation, vector, root)
            flat.finish()

        return self._start("broadcast", "broadcast", (tensors, options), tensors, run)

    def reduce(self, tensors: Tensors, options: Any) -> Work:
        root, combine, mean, flat = options.rootRank, _combine(options), self._mean(options), _Flat()
        vectors = [flat(tensor, written=self._rank == root) for tensor in tensors]

        def run(operation: Operation) -> None:
            for vector in vectors:
                if self._rank == root:
                    self._fold(vector, vector, combine, mean)
                else:
                    self._give(operation, root, vector)
            flat.finish()

        return self._start("reduce", "reduce", (tensors, options), tensors, run)

    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, options: Any) -> Work:
        flat = _Flat()
        pairs = [
            ([flat(out, written=True) for out in outs], flat(one)) for outs, one in zip(outputs, inputs, strict=True)
        ]
        return self._start("allgather", "allgather", (outputs, inputs, options), outputs, self._gathering(pairs, flat))

    def allgather_coalesced(self, outputs: Sequence[Tensors], inputs: Tensors, options: Any) -> Work:
        by_input = [list(outs) for outs in zip(*outputs, strict=True)]  # they come by rank
        flat = _Flat()
        pairs = [
            ([flat(out, written=True) for out in outs], flat(one)) for outs, one in zip(by_input, inputs, strict=True)
        ]
        work = self._gathering(pairs, flat)
        return self._start("allgather_coalesced", "allgather", (outputs, inputs, options), outputs, work)

    def all_gather_single(self, output: torch.Tensor, one: torch.Tensor, options: Any) -> Work:
        return self._all_gather_single("all_gather_single", [output], [one], (output, one, options))

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, options: Any) -> Work:
        return self._all_gather_single("all_gather_single_coalesced", outputs, inputs, (outputs, inputs, options))

    def _all_gather_single(self, name: str, outputs: Tensors, inputs: Tensors, arguments: tuple[Any, ...]) -> Work:
        flat = _Flat()
        pairs = [
            (self._equal_parts(flat(out, written=True)), flat(one)) for out, one in zip(outputs, inputs, strict=True)
        ]
        return self._start(name, "allgather", arguments, arguments[0], self._gathering(pairs, flat))

    def _gathering(
        self, pairs: list[tuple[list[torch.Tensor], torch.Tensor]], flat: "_Flat"
    ) -> Callable[[Operation], None]:
        def run(operation: Operation) -> None:
            for outs, own in pairs:
                for peer in self._peers:
                    self._give(operation, peer, own)
                _copy(own, outs[self._rank])
                for peer in self._peers:
                    self._take(peer, outs[peer])
            flat.finish()

        return run

    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], options: Any) -> Work:
        flat = _Flat()
        pairs = [
            (flat(out, written=True), [flat(one) for one in ones]) for out, ones in zip(outputs, inputs, strict=True)
        ]
        return self._reduce_scatter("reduce_scatter", pairs, flat, (outputs, inputs, options))

    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, options: Any) -> Work:
        flat = _Flat()
        pairs = [(flat(output, written=True), self._equal_parts(flat(whole)))]
        return self._reduce_scatter("reduce_scatter_single", pairs, flat, (output, whole, options))

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, options: Any) -> Work:
        flat = _Flat()
        pairs = [
            (flat(out, written=True), self._equal_parts(flat(whole)))
            for out, whole in zip(outputs, inputs, strict=True)
        ]
        return self._reduce_scatter("reduce_scatter_single_coalesced", pairs, flat, (outputs, inputs, options))

    def _reduce_scatter(
        self,
        name: str,
        pairs: list[tuple[torch.Tensor, list[torch.Tensor]]],
        flat: "_Flat",
        arguments: tuple[Any, ...],
    ) -> Work:
        combine, mean = _combine(arguments[-1]), self._mean(arguments[-1])

        def run(operation: Operation) -> None:
            for out, parts in pairs:
                for peer in self._peers:
                    self._give(operation, peer, parts[peer])
                self._fold(parts[self._rank], out, combine, mean)
            flat.finish()

        return self._start(name, "reduce_scatter", arguments, arguments[0], run)

    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, options: Any) -> Work:
        root, flat = options.rootRank, _Flat()
        own = flat(inputs[0])
        outs = [flat(out, written=True) for out in outputs[0]] if self._rank == root else []

        def run(operation: Operation) -> None:
            if self._rank != root:
                self._give(operation, root, own)
                return
            _copy(own, outs[root])
            for peer in self._peers:
                self._take(peer, outs[peer])
            flat.finish()

        return self._start("gather", "gather", (outputs, inputs, options), outputs, run)

    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], options: Any) -> Work:
        root, flat = options.rootRank, _Flat()
        own = flat(outputs[0], written=True)
        parts = [flat(part) for part in inputs[0]] if self._rank == root else []

        def run(operation: Operation) -> None:
            if self._rank == root:
                for peer in self._peers:
                    self._give(operation, peer, parts[peer])
                _copy(parts[root], own)
            else:
                self._take(root, own)
            flat.finish()

        return self._start("scatter", "scatter", (outputs, inputs, options), outputs, run)

    def alltoall(self, outputs: Tensors, inputs: Tensors, options: Any) -> Work:
        flat = _Flat()
        outs, parts = [flat(out, written=True) for out in outputs], [flat(part) for part in inputs]
        return self._exchange("alltoall", outs, parts, flat, (outputs, inputs, options))

    def all_to_all_single(
        self,
        output: torch.Tensor,
        whole: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        options: Any,
    ) -> Work:
        flat = _Flat()
        outs = self._parts(flat(output, written=True), output, output_splits)
        parts = self._parts(flat(whole), whole, input_splits)
        arguments = (output, whole, output_splits, input_splits, options)
        return self._exchange("all_to_all_single", outs, parts, flat, arguments)

    def _exchange(
        self,
        name: str,
        outs: list[torch.Tensor],
        parts: list[torch.Tensor],
        flat: "_Flat",
        arguments: tuple[Any, ...],
    ) -> Work:
        def run(operation: Operation) -> None:
            for peer in self._peers:
                self._give(operation, peer, parts[peer])
            _copy(parts[self._rank], outs[self._rank])
            for peer in self._peers:
                self._take(peer, outs[peer])
            flat.finish()

        return self._start(name, "alltoall", arguments, arguments[0], run)

    def barrier(self, options: Any) -> Work:
        def run(operation: Operation) -> None:
            nothing = torch.empty(0, dtype=torch.uint8)
            for peer in self._peers:
                self._give(operation, peer, nothing)
            for peer in self._peers:
                self._take(peer, nothing)

        return self._start("barrier", "barrier", (options,), [], run)

    def send(self, tensors: Tensors, peer: int, tag: int) -> Work:
        operation = self._begin("send", (tensors, peer, tag), tensors)
        sender = self._senders.get(peer)
        if sender is None:
            sender = self._senders[peer] = self._wire.sender(peer, Use.MESSAGES)
        (vector,) = map(_Flat(), tensors)
        sender.send(HEAD.pack(tag, 0, vector.nbytes), bytes_of(vector), operation)
        operation.end_part()
        return operation

    def recv(self, tensors: Tensors, peer: int, tag: int) -> Work:
        operation = self._begin("recv", (tensors, peer, tag), tensors)
        self._mailbox.receive(peer, tag, tensors[0], operation)
        return operation

    # How they are carried out, in the thread of the collectives.

    def _begin(self, name: str, arguments: tuple[Any, ...], result: Any) -> Operation:
        if self._round_end.reached:
            raise BrokenGroup(ENDED)
        self._traffic.count(name, self._rank, self._size, arguments)
        return Operation(result, limit=self._seconds, round_end=self._round_end)

    def _start(
        self, name: str, kind: str, arguments: tuple[Any, ...], result: Any, run: Callable[[Operation], None]
    ) -> Work:
        operation = self._begin(name, arguments, result)
        self._queue.put((kind, operation, run))
        return operation

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            kind, operation, run = item
            self._number, self._kind = self._number + 1, _NAMES.index(kind)
            try:
                if self._broken is None:
                    run(operation)
            except Exception as error:  # the peers are in the middle of it, too: nothing that follows could fit
                self._broken = BrokenGroup(error)
            operation.end_part(self._broken)
            del item, operation, run  # their tensors live no longer than needed

    def _give(self, operation: Operation, peer: int, vector: torch.Tensor) -> None:
        """Sends a vector to a peer, which takes it by the same operation."""
        head = HEAD.pack(self._number, self._kind, vector.nbytes)
        self._wire.outgoing[peer].send(head, bytes_of(vector), operation, now=True)

    def _take(self, peer: int, vector: torch.Tensor) -> None:
        self._take_head(peer, vector.nbytes)
        self._fill(peer, vector)

    def _take_head(self, peer: int, nbytes: int) -> None:
        try:
            number, kind, size = self._wire.incoming[peer].head()
        except OSError as error:
            raise _lost(peer, error) from None
        if (number, kind, size) != (self._number, self._kind, nbytes):
            raise BrokenGroup(
                f"rank {peer} is at collective {number}, {_NAMES[kind]}, with {size} bytes, where rank {self._rank} is at {self._number}, "
                f"{_NAMES[self._kind]}, with {nbytes}: all ranks must call the same operations on tensors of the same size"
            )

    def _fill(self, peer: int, vector: torch.Tensor) -> None:
        try:
            self._wire.incoming[peer].fill(bytes_of(vector))
        except OSError as error:
            raise _lost(peer, error) from None

    def _sum_everywhere(self, operation: Operation, vector: torch.Tensor, combine: Combine, mean: int) -> None:
        if vector.nbytes <= SMALL:  # one step: each rank adds all up
            for peer in self._peers:
                self._give(operation, peer, vector)
            self._fold(vector, vector, combine, mean)
            return
        parts = [part.view(-1) for part in vector.tensor_split(self._size)]
        for peer in self._peers:
            self._give(operation, peer, parts[peer])

        def give_to_all(piece: torch.Tensor) -> None:
            for peer in self._peers:
                self._give(operation, peer, piece)

        # A peer sends back a part only when it has all of it from this rank: nothing that is still to be sent is overwritten.
        own = parts[self._rank]
        self._fold(own, own, combine, mean, give_to_all)
        for peer in self._peers:
            for piece in _pieces(parts[peer]):
                self._take(peer, piece)

    def _fold(
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
        for mine, result in zip(_pieces(own), _pieces(out), strict=True):
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
                    _copy(mine, result)
                    total = result
            if mean > 1:
                result.div_(mean)
            done(result)

    def _spread(self, operation: Operation, vector: torch.Tensor, root: int) -> None:
        """To few or little at once; else each of the others gets a part from the root, and gives it to the rest."""
        others = [rank for rank in range(self._size) if rank != root]
        if len(others) < 2 or vector.nbytes <= SMALL:
            if self._rank == root:
                for peer in self._peers:
                    self._give(operation, peer, vector)
            else:
                self._take(root, vector)
            return
        parts = dict(zip(others, vector.tensor_split(len(others)), strict=True))
        if self._rank == root:
            for peer in self._peers:
                self._give(operation, peer, parts[peer])
            return
        own = parts[self._rank]
        self._take_head(root, own.nbytes)
        for piece in _pieces(own):
            self._fill(root, piece)
            for peer in self._peers:
                if peer != root:
                    self._give(operation, peer, piece)
        for peer in self._peers:
            if peer != root:
                for piece in _pieces(parts[peer]):
                    self._take(peer, piece)

    def _mean(self, options: Any) -> int:
        return self._size if options.reduceOp.op == _Op.AVG else 1

    def _equal_parts(self, whole: torch.Tensor) -> list[torch.Tensor]:
        if whole.numel() % self._size:
            raise ValueError(f"{whole.numel()} elements cannot be divided by {self._size} ranks")
        return list(whole.view(self._size, -1).unbind())

    def _parts(self, vector: torch.Tensor, tensor: torch.Tensor, splits: Sequence[int]) -> list[torch.Tensor]:
        """As the splits, counted in the first dimension, say; equal ones without splits."""
        if not splits:
            return self._equal_parts(vector)
        row = vector.numel() // tensor.shape[0] if tensor.numel() else 0
        return list(torch.split(vector, [row * count for count in splits]))


# What it does not do. torch's own properties ask a backend in Python without end, and splitting would pass by `register`.
for _name in (
    "supports_splitting",
    "supports_coalescing",
    "supports_shrinking",
    "supports_reconfigure",
    "supports_window",
    "_supports_time_estimate",
):
    setattr(WireBackend, _name, False)


class _Flat:
    """Makes a tensor one of one dimension whose elements are neighbours in the memory of the host; where that takes a copy, `finish`
    copies it back."""

    def __init__(self) -> None:
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, tensor: torch.Tensor, *, written: bool = False) -> torch.Tensor:
        tensor = tensor.detach()
        if _is_plain(tensor):
            return tensor.view(-1)
        copy = tensor.contiguous().cpu()
        if written:
            self._copies.append((tensor, copy))
        return copy.view(-1)

    def finish(self) -> None:
        for tensor, copy in self._copies:
            tensor.copy_(copy)


class _Mailbox:
    """Messages of the peers and those who wait for them: in the order of their coming and of their calls, for each peer and tag."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: defaultdict[tuple[int, int], deque[tuple[torch.Tensor, Operation]]] = defaultdict(deque)
        self._arrived: defaultdict[tuple[int, int], deque[torch.Tensor]] = defaultdict(deque)
        self._lost: dict[int, BrokenGroup] = {}
        self._end: BrokenGroup | None = None

    def receive(self, peer: int, tag: int, tensor: torch.Tensor, operation: Operation) -> None:
        """The next message with this tag goes into the tensor."""
        error: Exception | None = None
        with self._lock:
            arrived = self._arrived[peer, tag]
            message = arrived.popleft() if arrived else None
            if message is None:
                error = self._end or self._lost.get(peer)
                if error is None:
                    self._waiting[peer, tag].append((tensor, operation))
                    return
        operation.end_part(error if message is None else _deliver(message, tensor))

    def fill(self, peer: int, receiver: Receiver) -> None:
        """Reads the messages of a peer until the connection is lost."""
        try:
            while True:
                tag, _, size = receiver.head()
                self._read(peer, tag, size, receiver)
        except OSError as error:
            lost = _lost(peer, error)
        with self._lock:
            self._lost[peer] = lost
            over = [one for key, waiting in self._waiting.items() if key[0] == peer for one in waiting]
            for key in [key for key in self._waiting if key[0] == peer]:
                del self._waiting[key]
        for _, operation in over:
            operation.end_part(lost)

    def close(self, error: BrokenGroup) -> None:
        """No message will come."""
        with self._lock:
            self._end = self._end or error
            over = [one for waiting in self._waiting.values() for one in waiting]
            self._waiting.clear()
        for _, operation in over:
            operation.end_part(error)

    def _read(self, peer: int, tag: int, size: int, receiver: Receiver) -> None:
        with self._lock:
            waiting = self._waiting[peer, tag]
            tensor, operation = waiting.popleft() if waiting else (None, None)
        if tensor is not None and operation is not None and _is_plain(tensor) and tensor.nbytes == size:
            try:
                receiver.fill(bytes_of(tensor.detach().view(-1)))
            except OSError as error:
                operation.end_part(_lost(peer, error))
                raise
            operation.end_part()
            return
        message = torch.empty(size, dtype=torch.uint8)
        try:
            receiver.fill(bytes_of(message))
        except OSError as error:
            if operation is not None:
                operation.end_part(_lost(peer, error))
            raise
        if tensor is None or operation is None:
            with self._lock:
                waiting = self._waiting[peer, tag]
                if not waiting:
                    self._arrived[peer, tag].append(message)
                    return
                tensor, operation = waiting.popleft()
        operation.end_part(_deliver(message, tensor))


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous()


def _lost(peer: int, error: OSError) -> BrokenGroup:
    return BrokenGroup(f"the connection from rank {peer} is lost: {error}")


def _deliver(message: torch.Tensor, tensor: torch.Tensor) -> Exception | None:
    if message.numel() != tensor.nbytes:
        return ValueError(f"a message of {message.numel()} bytes came for a tensor of {tensor.nbytes}")
    tensor.detach().copy_(message.view(tensor.dtype).view(tensor.shape))
    return None


def _combine(options: Any) -> Combine:
    combine = _COMBINE.get(options.reduceOp.op)
    if combine is None:
        raise ValueError(
            f"{options.reduceOp.op} is not done over TLS; use one of {', '.join(op.name for op in _COMBINE)}"
        )
    return combine


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)


def _pieces(vector: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(torch.split(vector, max(1, PIECE // vector.itemsize)))
