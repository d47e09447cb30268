"""The share that one rank of a group has of the servers' vectors: the rows or columns of each parameter that it trains (docs/design/0018).

A share is a list of strips, in the order of the vectors. Packed, its elements follow one another. A block of rows is one run; one of
columns is a run for each row, all `stride` apart. Parameters lie one after the other, so that what a shard owns of a share is one range of
its packed vector.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from disttrain_trainer.model.flat import Span, Vectors, bytes_of
from disttrain_trainer.net.frames import ProtocolError
from disttrain_trainer.parameter_server.participation import Took, took_of
from disttrain_trainer.runtime.memory import zeros


@dataclass(frozen=True, slots=True)
class Strip:
    """`count` runs of `length` elements of a vector, which begin `stride` elements apart."""

    vector: int
    start: int
    length: int
    count: int = 1
    stride: int = 0

    @property
    def elements(self) -> int:
        return self.length * self.count

    @property
    def stop(self) -> int:
        """Behind its last element."""
        return self.start + (self.count - 1) * self.stride + self.length

    def within(self, first: int, last: int) -> "Iterator[Strip]":
        """What of it lies in the elements [first, last) of the vector, counted from `first`; three strips at most."""
        stride = self.stride or self.length
        low = max(0, (first - self.start - self.length) // stride + 1)
        high = min(self.count, -(-(last - self.start) // stride))
        if low >= high:
            return
        if self.start + low * stride < first:
            yield self._run(low, first, last)
            low += 1
        torn = low < high and self.start + (high - 1) * stride + self.length > last
        high -= torn
        if low < high:
            count = high - low
            yield Strip(self.vector, self.start + low * stride - first, self.length, count, stride if count > 1 else 0)
        if torn:
            yield self._run(high, first, last)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(vector, start, stop) of each run."""
        for number in range(self.count):
            start = self.start + number * self.stride
            yield self.vector, start, start + self.length

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """Its elements of the vector, as (count, length): a view."""
        return vector.as_strided(
            (self.count, self.length), (self.stride or self.length, 1), vector.storage_offset() + self.start
        )

    def _run(self, number: int, first: int, last: int) -> "Strip":
        start = self.start + number * self.stride
        begin, end = max(start, first), min(start + self.length, last)
        return Strip(self.vector, begin - first, end - begin)


@dataclass(frozen=True, slots=True)
class RankShare:
    """What a rank tells each shard of itself after HELLO."""

    lease: str
    """That of its group: ranks of one lease bring the shares of the same parts."""
    members: int
    """Ranks of the group."""
    strips: tuple[Strip, ...]
    """Of the whole vectors, ascending, none in two."""

    def of_shard(self, spans: Sequence[Span]) -> "RankShare":
        """The part of it that a shard owns, counted from the begin of the shard's spans."""
        ours = (
            strip
            for whole in self.strips
            for strip in whole.within(spans[whole.vector].start, spans[whole.vector].stop)
        )
        return RankShare(self.lease, self.members, tuple(ours))

    def lengths(self, vectors: int) -> list[int]:
        """Elements of each packed vector."""
        found = [0] * vectors
        for strip in self.strips:
            found[strip.vector] += strip.elements
        return found

    def encode(self) -> bytes:
        """The body of SHARE."""
        strips = [(s.vector, s.start, s.length, s.count, s.stride) for s in self.strips]
        return json.dumps({"lease": self.lease, "members": self.members, "strips": strips}).encode()

    @classmethod
    def decode(cls, data: bytes | bytearray, lengths: Sequence[int], *, members: int) -> "RankShare":
        """That of a shard whose vectors are so long, in a job whose groups have so many ranks. Raises ProtocolError."""
        try:
            found = json.loads(bytes(data))
            strips = tuple(Strip(*map(int, strip)) for strip in found["strips"])
            share = cls(str(found["lease"])[:256], int(found["members"]), strips)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ProtocolError("a SHARE is malformed") from None
        if share.members != members:
            raise ProtocolError(f"a SHARE is of a group of {share.members} ranks; those of this job have {members}")
        behind = [0] * len(lengths)
        for strip in strips:
            is_whole = strip.length > 0 and strip.count > 0 and (strip.count == 1 or strip.stride >= strip.length)
            if not (is_whole and 0 <= strip.vector < len(lengths) and behind[strip.vector] <= strip.start):
                raise ProtocolError("a SHARE has strips that overlap, or of no vector")
            behind[strip.vector] = strip.stop
        if any(stop > length for stop, length in zip(behind, lengths, strict=True)):
            raise ProtocolError("a SHARE has elements that are not of this shard")
        return share


class PackedShare:
    """A rank's share of one shard on the server: its strips, and memory for what comes and goes. For the thread of one connection."""

    def __init__(self, share: RankShare, spans: Sequence[Span]) -> None:
        """spans: those of the shard."""
        self.lease = share.lease
        self.members = share.members
        self.lengths = share.lengths(len(spans))
        self._strips = share.strips
        self._spans = spans
        self._packed = [zeros(length, span.dtype) for length, span in zip(self.lengths, spans, strict=True)]
        self.views = [bytes_of(packed) for packed in self._packed if len(packed)]
        """The bytes of the packed vectors."""
        self._took: Took = None

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.views))

    def gather(self, parts: Vectors) -> None:
        """Packs its elements of these vectors."""
        for strip, packed in self._pairs():
            packed.copy_(strip.of(parts[strip.vector]))

    def scatter(self, parts: Vectors) -> None:
        """Puts the packed elements into their places of these vectors."""
        for strip, packed in self._pairs():
            strip.of(parts[strip.vector]).copy_(packed)

    @property
    def took(self) -> Took:
        """Its elements, as those of which all took part."""
        if self._took is None:
            runs = [run for strip in self._strips for run in strip.runs()]
            self._took = took_of(runs, [span.length for span in self._spans])
        return self._took

    def _pairs(self) -> Iterator[tuple[Strip, torch.Tensor]]:
        at = [0] * len(self._packed)
        for strip in self._strips:
            begin = at[strip.vector]
            at[strip.vector] = begin + strip.elements
            yield strip, self._packed[strip.vector][begin : at[strip.vector]].view(strip.count, strip.length)


def packed_spans(shares: Iterable[RankShare], spans: Sequence[Span]) -> list[tuple[Span, ...]]:
    """Where each shard's share lies in the packed vectors. shares: of the shards in turn. spans: of any shard, for the dtypes."""
    begin, found = [0] * len(spans), []
    for share in shares:
        lengths = share.lengths(len(spans))
        found.append(
            tuple(
                Span(dtype=span.dtype, start=start, stop=start + length)
                for span, start, length in zip(spans, begin, lengths, strict=True)
            )
        )
        begin = [start + length for start, length in zip(begin, lengths, strict=True)]
    return found
