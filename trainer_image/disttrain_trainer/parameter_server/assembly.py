"""Gradients and first parameters that the ranks of a group bring in shares: a part counts once all ranks of one lease have brought theirs.

What a rank that is lost has brought is dropped with its lease, and another group computes the part whole: an update never has shares of two
groups, whose parameters may differ under Async.
"""

import threading
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from disttrain_trainer.net.frames import Reason, Refusal
from disttrain_trainer.parameter_server.participation import Took, union
from disttrain_trainer.parameter_server.sessions import Gradient, Session
from disttrain_trainer.parameter_server.shard import Buffers
from disttrain_trainer.parameter_server.shares import PackedShare

_FIRST = -1
"""In place of a part's number: the first parameters."""


class Pushed(NamedTuple):
    """What became of a pushed gradient."""

    version: int
    """Of the shard after that."""
    late: bool
    """The part counted already: the gradient was ignored."""


class Host(Protocol):
    """The shard that gets what is whole."""

    def take(self) -> Buffers: ...
    def give(self, buffers: Buffers) -> None: ...
    def initialize(self, values: Buffers) -> bool: ...
    def push(self, session: Session, gradient: Gradient, buffers: Buffers | None) -> Pushed: ...
    def brought(self, session: Session, clock: int) -> int: ...


@dataclass(slots=True)
class _Open:
    """What is not whole yet."""

    buffers: Buffers | None
    ranks: set[int]
    lengths: list[int]
    """Elements that are here, of each vector."""
    took: list[tuple[Took, PackedShare]]
    version: int = 0


class Assemblies:
    """Those of one shard. Any thread may call any method."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = threading.Lock()  # also while elements are copied: their memory may be given back otherwise
        self._open: dict[tuple[str, int], _Open] = {}

    def initialize(self, session: Session, share: PackedShare) -> bool:
        """A rank offers its share of the first parameters. Whether they are the shard's now: they are when all have come."""
        with self._lock:
            whole = self._add(session, share, _FIRST, empty=False)
        return whole is not None and whole.buffers is not None and self._host.initialize(whole.buffers)

    def push(self, session: Session, gradient: Gradient, share: PackedShare) -> Pushed:
        """A rank brings its share of a part's gradient, which is packed in `share`, or that of a part without samples. Raises Refusal."""
        with self._lock:
            whole = self._add(session, share, gradient.index, empty=not gradient.samples, gradient=gradient)
        if whole is None:
            return Pushed(self._host.brought(session, gradient.clock), late=False)
        took: Took = None
        if any(own is not None for own, _ in whole.took):
            lengths = whole.lengths
            took = tuple(() for _ in lengths)
            for own, of in whole.took:
                took = union(took, of.took if own is None else own, lengths)
        return self._host.push(session, replace(gradient, took=took, version=whole.version), whole.buffers)

    def abandon(self, lease: str) -> None:
        """A rank of this lease is gone."""
        with self._lock:
            for key in [key for key in self._open if key[0] == lease]:
                if (buffers := self._open.pop(key).buffers) is not None:
                    self._host.give(buffers)

    def _add(
        self, session: Session, share: PackedShare, index: int, *, empty: bool, gradient: Gradient | None = None
    ) -> _Open | None:
        """Adds a share; what is whole with it, or None."""
        key = share.lease, index
        found = self._open.get(key)
        if found is None:
            buffers = None if empty else self._host.take()
            version = gradient.version if gradient is not None else 0
            found = self._open[key] = _Open(buffers, set(), [0] * len(share.lengths), [], version)
        if session.rank in found.ranks or (found.buffers is None) != empty:
            raise Refusal(Reason.MISTAKE, f"worker {session.rank} brings its share of part {index} a second time")
        found.ranks.add(session.rank)
        if gradient is not None:
            found.took.append((gradient.took, share))
            found.version = min(found.version, gradient.version)
        if found.buffers is not None:
            share.scatter(found.buffers.parts)
            found.lengths = [have + more for have, more in zip(found.lengths, share.lengths, strict=True)]
        if len(found.ranks) < share.members:
            return None
        del self._open[key]
        if found.buffers is not None and found.lengths != (wanted := [s.length for s in found.buffers.spans]):
            self._host.give(found.buffers)
            raise Refusal(
                Reason.MISTAKE, f"the shares of {share.members} ranks have {found.lengths} elements, not {wanted}"
            )
        return found
