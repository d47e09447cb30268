"""What travels of a pushed gradient: strategy.parameterServer.compression.

- BFloat16: each vector of 32 or 64 bits rounded to nearest in bfloat16. No memory of what was rounded away: the error of an element is at
  most 2^-9 of it, and without a memory a part has the same bits whichever worker computes it.
- TopK (Aji and Heafield, EMNLP 2017; error feedback: Stich, Cordonnier and Jaggi, NeurIPS 2018, arXiv 1809.07599): of each vector the
  ceil(fraction x length) elements of the largest magnitude of gradient + residual, among those that take part in the step. The residual
  is what was not sent; it lies on the worker, and is lost with it. Which elements these are does not depend on the number of servers.
  Of a part of weight 0 nothing is sent.

Wire of TopK, for each vector of a shard: their number (8 bytes), their positions in the shard, ascending (int32; int64 in a shard of 2^31
elements or more), their values (of the vector's dtype). The server makes a whole gradient of it, with zeros.
"""

import math
import struct
from collections.abc import Sequence
from typing import Protocol

import torch

from disttrain.api.strategy import Compression as Settings
from disttrain.api.strategy import CompressionType
from disttrain_trainer.model.flat import Span, Vectors, bytes_of, norm
from disttrain_trainer.net.frames import BFLOAT16, SPARSE, Header, Link, ProtocolError
from disttrain_trainer.parameter_server.shard import Buffers

_COUNT = struct.Struct("<Q")
Runs = Sequence[tuple[int, int, int]]
"""(vector, start, stop) of elements."""
_BLOCK = 1 << 17
"""Elements of a rounded gradient that a server receives at a time."""


class Compression(Protocol):
    """The worker's side, for one thread: `encode` once for a gradient, then `payload` for each shard, in any threads."""

    flag: int
    """The bit of the code of PUSH."""

    @property
    def norm(self) -> float:
        """Of what is sent to all shards together."""

    def encode(self, gradient: Vectors, runs: Runs | None = None) -> None:
        """A gradient is to be sent; it is not changed. Vectors on the CPU, one for each dtype. runs: the elements that count of it; None:
        all."""

    def payload(self, spans: Sequence[Span]) -> list[memoryview]:
        """What is sent of it to the shard with these spans. Valid until the next `encode`."""

    def reset(self) -> None:
        """The servers went back to a checkpoint: what was not sent is of steps that are lost."""


def of(settings: Settings, like: Vectors) -> Compression | None:
    """The compression of one worker; None where gradients travel as they are. like: the model's vectors."""
    match settings.type:
        case CompressionType.NONE:
            return None
        case CompressionType.BFLOAT16:
            return Rounded(like)
        case CompressionType.TOP_K:
            return Largest(like, settings.top_k_fraction)


class Rounded:
    """BFloat16."""

    flag = BFLOAT16

    def __init__(self, like: Vectors) -> None:
        self._rounded = tuple(torch.empty(len(vector), dtype=_rounded_dtype(vector.dtype)) for vector in like)

    def encode(self, gradient: Vectors, runs: Runs | None = None) -> None:
        for rounded, vector in zip(self._rounded, gradient, strict=True):
            rounded.copy_(vector)

    @property
    def norm(self) -> float:
        return norm(self._rounded)

    def payload(self, spans: Sequence[Span]) -> list[memoryview]:
        return [bytes_of(vector[span.start : span.stop]) for vector, span in zip(self._rounded, spans, strict=True)]

    def reset(self) -> None:
        pass


class Largest:
    """TopK with error feedback."""

    flag = SPARSE

    def __init__(self, like: Vectors, fraction: float) -> None:
        self._fraction = fraction
        self.residual = tuple(torch.zeros(len(vector), dtype=_wide_dtype(vector.dtype)) for vector in like)
        """What was not sent yet, for each vector; of 32 bits beside vectors of 16."""
        self._sent: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Of each vector the positions, ascending, and the values."""

    def encode(self, gradient: Vectors, runs: Runs | None = None) -> None:
        self._sent = []
        for number, (residual, vector) in enumerate(zip(self.residual, gradient, strict=True)):
            # What is sent of other elements would be lost: the servers leave these as they are.
            counting = (
                [(0, len(vector))] if runs is None else [(start, stop) for at, start, stop in runs if at == number]
            )
            magnitudes = torch.full_like(residual, -1.0)
            for start, stop in counting:
                residual[start:stop].add_(vector[start:stop])
                torch.abs(residual[start:stop], out=magnitudes[start:stop])
            count = min(math.ceil(self._fraction * len(residual)), sum(stop - start for start, stop in counting))
            positions = magnitudes.topk(count, sorted=False).indices.sort().values
            values = residual[positions].to(vector.dtype)
            residual[positions] -= values.to(residual.dtype)
            self._sent.append((positions, values))

    @property
    def norm(self) -> float:
        return norm([values for _, values in self._sent])

    def payload(self, spans: Sequence[Span]) -> list[memoryview]:
        parts: list[memoryview] = []
        for (positions, values), span in zip(self._sent, spans, strict=True):
            edges = torch.tensor([span.start, span.stop])
            first, last = (int(edge) for edge in torch.searchsorted(positions, edges))
            inside = (positions[first:last] - span.start).to(_position_dtype(span))
            parts.append(memoryview(_COUNT.pack(last - first)))
            if first < last:
                parts += [bytes_of(inside), bytes_of(values[first:last])]
        return parts

    def reset(self) -> None:
        for residual in self.residual:
            residual.zero_()


def receive(link: Link, header: Header, into: Buffers, before: int) -> None:
    """The server's side: reads what `payload` gave into the shard's buffers. before: bytes of the payload that were read already.

    Raises ProtocolError for what no worker sends; the content of the buffers is undefined then.
    """
    left = header.nbytes - before
    for part, span in zip(into.parts, into.spans, strict=True):
        values = part[: span.length]
        left -= (
            _receive_rounded(link, values, left)
            if header.code & BFLOAT16
            else _receive_sparse(link, span, values, left)
        )
    if left:
        raise ProtocolError(f"part {header.index} has {left} bytes more than a compressed gradient of this shard")


def _receive_rounded(link: Link, into: torch.Tensor, left: int) -> int:
    dtype = _rounded_dtype(into.dtype)
    size = len(into) * dtype.itemsize
    _require(size <= left)
    block = torch.empty(min(_BLOCK, len(into)), dtype=dtype)
    for start in range(0, len(into), _BLOCK):
        place = into[start : start + _BLOCK]
        link.receive_some_of(bytes_of(block[: len(place)]))
        place.copy_(block[: len(place)])
    return size


def _receive_sparse(link: Link, span: Span, into: torch.Tensor, left: int) -> int:
    _require(left >= _COUNT.size)
    head = bytearray(_COUNT.size)
    link.receive_some_of(memoryview(head))
    count = int.from_bytes(head, "little")
    positions_dtype = _position_dtype(span)
    size = _COUNT.size + count * (positions_dtype.itemsize + span.dtype.itemsize)
    _require(count <= span.length and size <= left)
    into.zero_()
    if not count:
        return size
    positions, values = torch.empty(count, dtype=positions_dtype), torch.empty(count, dtype=span.dtype)
    link.receive_some_of(bytes_of(positions))
    link.receive_some_of(bytes_of(values))
    ascending = bool((positions[1:] > positions[:-1]).all())
    _require(ascending and int(positions[0]) >= 0 and int(positions[-1]) < span.length)
    into[positions.long()] = values
    return size


def _require(holds: bool) -> None:
    if not holds:
        raise ProtocolError("a compressed gradient does not fit into this shard")


def _position_dtype(span: Span) -> torch.dtype:
    return torch.int32 if span.length < 1 << 31 else torch.int64


def _rounded_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a vector is sent as under BFloat16: one of 16 bits stays as it is."""
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype
