"""trainer.maxGradientNorm on synchronous servers: the norm of a step's gradient, put together from what each shard says of its part.

A step takes place on no shard before its norm is known. The primary of each shard sends the squares of its sum when that is whole; the
master adds them up by a tree that does not depend on the cut (model/square_tree.py), and sends all primaries the norm. The first
norm of a step stands, also for a shard whose sum was computed again after its server was lost: every shard is to step with one coefficient.
So a server says, too, which norm it has stepped with, and a new master learns what the one before has decided. Pure.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disttrain_trainer.model import square_tree
from disttrain_trainer.net.messages import Message

_KEPT = 2
"""Steps whose norms are kept: shards are at most one step apart."""


class GradientNorms:
    """The norms of the newest steps of the newest round."""

    def __init__(self, *, shards: int, serves: Callable[[int, int, int], bool]) -> None:
        """serves(server, shard, term): whether this server is the shard's primary, by the term that counts now."""
        self._shards = shards
        self._serves = serves
        self._round = 0
        self._decided: dict[int, float] = {}
        """Norms, by the version that the step makes."""
        self._parts: dict[int, dict[int, Mapping[str, Any]]] = {}
        """By version and shard: what its primary said."""

    @property
    def round_number(self) -> int:
        """Of which the norms are."""
        return self._round

    @property
    def newest(self) -> float | None:
        """Of the newest step; None before the first."""
        return self._decided[max(self._decided)] if self._decided else None

    def know(self, server: int, message: Message) -> list[tuple[int, float]]:
        """Records what a server says of its sums. Returns (version, norm) of each step whose norm all primaries are to get: a server that
        sends its squares waits for it."""
        round_number = int(message["generation"])
        if round_number < self._round:
            return []
        if round_number > self._round:
            self._round, self._decided, self._parts = round_number, {}, {}
        asked = set[int]()
        for said in message.get("norms", ()):
            version, shard = int(said["version"]), int(said["shard"])
            if not self._serves(server, shard, int(said["term"])):
                continue
            if said.get("norm") is not None:
                self._decided.setdefault(version, float(said["norm"]))
            else:
                asked.add(version)
                self._parts.setdefault(version, {})[shard] = said
        for version, parts in self._parts.items():
            if version not in self._decided and len(parts) == self._shards:
                self._decided[version] = _norm(list(parts.values()))
                asked.add(version)
        answers = [(version, self._decided[version]) for version in sorted(asked) if version in self._decided]
        self._forget()
        return answers

    def _forget(self) -> None:
        if self._decided:
            oldest = max(self._decided) - _KEPT
            for of in (self._decided, self._parts):
                for version in [version for version in of if version <= oldest]:
                    del of[version]


def _norm(parts: Sequence[Mapping[str, Any]]) -> float:
    """Of the whole gradient: the sum over its vectors, each cut over the shards."""
    vectors = max(len(part["nodes"]) for part in parts)
    squares = [
        square_tree.total((level, number, square) for nodes in of for level, number, square in nodes)
        for of in (
            [part["nodes"][vector] for part in parts if vector < len(part["nodes"])] for vector in range(vectors)
        )
    ]
    return math.sqrt(math.fsum(squares)) * abs(float(parts[0]["scale"]))
