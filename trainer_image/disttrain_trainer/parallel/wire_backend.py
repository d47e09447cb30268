"""c10d's backend `disttrain` under TLS, which gloo does not have: the same operations, over connections of ours (`wire`).

One thread carries out the collectives of a group, in the order in which they were called (`wire_collectives`).

A message goes with a tag, and comes into the tensor that waits for it, or into memory until one does. A lost peer closes its connections,
which ends the waits for it; `close` ends all, at once: no operation needs more than its connection.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import Work

from disttrain_trainer.model.flat import bytes_of
from disttrain_trainer.net.transport import Transport
from disttrain_trainer.parallel.backend import ENDED, NAME, BrokenGroup, RoundBackend, RoundEnd
from disttrain_trainer.parallel.operation import Operation
from disttrain_trainer.parallel.traffic import Traffic
from disttrain_trainer.parallel.wire import HEAD, Sender, Use, Wire
from disttrain_trainer.parallel.wire_collectives import Collectives
from disttrain_trainer.parallel.wire_mailbox import Mailbox
from disttrain_trainer.parallel.wire_tensors import Flat, Op, Tensors, combine_of, copy


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
        self._mailbox = Mailbox()
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
        self._collectives = Collectives(self._wire, rank=rank, size=size)

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
        self._collectives.finish()
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
        combine, mean, flat = combine_of(options), self._mean(options), Flat()
        vectors = [flat(tensor, written=True) for tensor in tensors]

        def run(operation: Operation) -> None:
            for vector in vectors:
                self._collectives.sum_everywhere(operation, vector, combine, mean)
            flat.finish()

        return self._start(name, "allreduce", (tensors, options), tensors, run)

    def broadcast(self, tensors: Tensors, options: Any) -> Work:
        root, flat = options.rootRank, Flat()
        vectors = [flat(tensor, written=self._rank != root) for tensor in tensors]

        def run(operation: Operation) -> None:
            for vector in vectors:
                self._collectives.spread(operation, vector, root)
            flat.finish()

        return self._start("broadcast", "broadcast", (tensors, options), tensors, run)

    def reduce(self, tensors: Tensors, options: Any) -> Work:
        root, combine, mean, flat = options.rootRank, combine_of(options), self._mean(options), Flat()
        vectors = [flat(tensor, written=self._rank == root) for tensor in tensors]

        def run(operation: Operation) -> None:
            for vector in vectors:
                if self._rank == root:
                    self._collectives.fold(vector, vector, combine, mean)
                else:
                    self._collectives.give(operation, root, vector)
            flat.finish()

        return self._start("reduce", "reduce", (tensors, options), tensors, run)

    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, options: Any) -> Work:
        flat = Flat()
        pairs = [
            ([flat(out, written=True) for out in outs], flat(one)) for outs, one in zip(outputs, inputs, strict=True)
        ]
        return self._start("allgather", "allgather", (outputs, inputs, options), outputs, self._gathering(pairs, flat))

    def allgather_coalesced(self, outputs: Sequence[Tensors], inputs: Tensors, options: Any) -> Work:
        by_input = [list(outs) for outs in zip(*outputs, strict=True)]  # they come by rank
        flat = Flat()
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
        flat = Flat()
        pairs = [
            (self._equal_parts(flat(out, written=True)), flat(one)) for out, one in zip(outputs, inputs, strict=True)
        ]
        return self._start(name, "allgather", arguments, arguments[0], self._gathering(pairs, flat))

    def _gathering(
        self, pairs: list[tuple[list[torch.Tensor], torch.Tensor]], flat: "Flat"
    ) -> Callable[[Operation], None]:
        def run(operation: Operation) -> None:
            for outs, own in pairs:
                for peer in self._peers:
                    self._collectives.give(operation, peer, own)
                copy(own, outs[self._rank])
                for peer in self._peers:
                    self._collectives.take(peer, outs[peer])
            flat.finish()

        return run

    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], options: Any) -> Work:
        flat = Flat()
        pairs = [
            (flat(out, written=True), [flat(one) for one in ones]) for out, ones in zip(outputs, inputs, strict=True)
        ]
        return self._reduce_scatter("reduce_scatter", pairs, flat, (outputs, inputs, options))

    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, options: Any) -> Work:
        flat = Flat()
        pairs = [(flat(output, written=True), self._equal_parts(flat(whole)))]
        return self._reduce_scatter("reduce_scatter_single", pairs, flat, (output, whole, options))

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, options: Any) -> Work:
        flat = Flat()
        pairs = [
            (flat(out, written=True), self._equal_parts(flat(whole)))
            for out, whole in zip(outputs, inputs, strict=True)
        ]
        return self._reduce_scatter("reduce_scatter_single_coalesced", pairs, flat, (outputs, inputs, options))

    def _reduce_scatter(
        self,
        name: str,
        pairs: list[tuple[torch.Tensor, list[torch.Tensor]]],
        flat: "Flat",
        arguments: tuple[Any, ...],
    ) -> Work:
        combine, mean = combine_of(arguments[-1]), self._mean(arguments[-1])

        def run(operation: Operation) -> None:
            for out, parts in pairs:
                for peer in self._peers:
                    self._collectives.give(operation, peer, parts[peer])
                self._collectives.fold(parts[self._rank], out, combine, mean)
            flat.finish()

        return self._start(name, "reduce_scatter", arguments, arguments[0], run)

    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, options: Any) -> Work:
        root, flat = options.rootRank, Flat()
        own = flat(inputs[0])
        outs = [flat(out, written=True) for out in outputs[0]] if self._rank == root else []

        def run(operation: Operation) -> None:
            if self._rank != root:
                self._collectives.give(operation, root, own)
                return
            copy(own, outs[root])
            for peer in self._peers:
                self._collectives.take(peer, outs[peer])
            flat.finish()

        return self._start("gather", "gather", (outputs, inputs, options), outputs, run)

    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], options: Any) -> Work:
        root, flat = options.rootRank, Flat()
        own = flat(outputs[0], written=True)
        parts = [flat(part) for part in inputs[0]] if self._rank == root else []

        def run(operation: Operation) -> None:
            if self._rank == root:
                for peer in self._peers:
                    self._collectives.give(operation, peer, parts[peer])
                copy(parts[root], own)
            else:
                self._collectives.take(root, own)
            flat.finish()

        return self._start("scatter", "scatter", (outputs, inputs, options), outputs, run)

    def alltoall(self, outputs: Tensors, inputs: Tensors, options: Any) -> Work:
        flat = Flat()
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
        flat = Flat()
        outs = self._parts(flat(output, written=True), output, output_splits)
        parts = self._parts(flat(whole), whole, input_splits)
        arguments = (output, whole, output_splits, input_splits, options)
        return self._exchange("all_to_all_single", outs, parts, flat, arguments)

    def _exchange(
        self,
        name: str,
        outs: list[torch.Tensor],
        parts: list[torch.Tensor],
        flat: "Flat",
        arguments: tuple[Any, ...],
    ) -> Work:
        def run(operation: Operation) -> None:
            for peer in self._peers:
                self._collectives.give(operation, peer, parts[peer])
            copy(parts[self._rank], outs[self._rank])
            for peer in self._peers:
                self._collectives.take(peer, outs[peer])
            flat.finish()

        return self._start(name, "alltoall", arguments, arguments[0], run)

    def barrier(self, options: Any) -> Work:
        def run(operation: Operation) -> None:
            nothing = torch.empty(0, dtype=torch.uint8)
            for peer in self._peers:
                self._collectives.give(operation, peer, nothing)
            for peer in self._peers:
                self._collectives.take(peer, nothing)

        return self._start("barrier", "barrier", (options,), [], run)

    def send(self, tensors: Tensors, peer: int, tag: int) -> Work:
        operation = self._begin("send", (tensors, peer, tag), tensors)
        sender = self._senders.get(peer)
        if sender is None:
            sender = self._senders[peer] = self._wire.sender(peer, Use.MESSAGES)
        (vector,) = map(Flat(), tensors)
        sender.send(HEAD.pack(tag, 0, vector.nbytes), bytes_of(vector), operation)
        operation.end_part()
        return operation

    def recv(self, tensors: Tensors, peer: int, tag: int) -> Work:
        operation = self._begin("recv", (tensors, peer, tag), tensors)
        self._mailbox.receive(peer, tag, tensors[0], operation)
        return operation

    def _begin(self, name: str, arguments: tuple[Any, ...], result: Any) -> Operation:
        if self._round_end.reached:
            raise BrokenGroup(ENDED)
        self._traffic.count(name, self._rank, self._size, arguments)
        return Operation(result, limit=self._seconds, round_end=self._round_end)

    def _start(
        self, name: str, kind: str, arguments: tuple[Any, ...], result: Any, run: Callable[[Operation], None]
    ) -> Work:
        operation = self._begin(name, arguments, result)
        self._collectives.start(kind, operation, run)
        return operation

    def _mean(self, options: Any) -> int:
        return self._size if options.reduceOp.op == Op.AVG else 1

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
