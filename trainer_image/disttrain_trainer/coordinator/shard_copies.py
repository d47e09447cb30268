"""Which server serves each shard, and where its copy is to be (docs/design/0011). Pure: what the servers hold goes in, choices come out."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Held(NamedTuple):
    """A shard as one server holds it."""

    term: int
    is_primary: bool
    complete: bool
    """Whether a copy may be promoted."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The primary of a shard."""

    server: int
    term: int
    is_promoted: bool
    """Whether it is a copy until now."""


Holdings = Mapping[int, Mapping[int, Held]]
"""By server and shard."""


def choose(holdings: Holdings, *, shards: int) -> list[Choice] | None:
    """The primary of each shard: the holder with the highest term, and of several the one that is the primary already.

    A primary that was replaced while it was away has a lower term than the one that replaced it, and than that one's copy. None when a
    shard is held by no server: then the round is lost.
    """
    choices = []
    for shard in range(shards):
        holders = [
            (held[shard].term, held[shard].is_primary, -server)
            for server, held in holdings.items()
            if shard in held and (held[shard].is_primary or held[shard].complete)
        ]
        if not holders:
            return None
        term, is_primary, server = max(holders)
        choices.append(Choice(-server, term if is_primary else term + 1, not is_primary))
    return choices


def replaced(holdings: Holdings, choices: list[Choice]) -> dict[int, list[tuple[int, int]]]:
    """By server the shards, with their terms, of which it takes itself for the primary and is not."""
    found: dict[int, list[tuple[int, int]]] = {}
    for server, held in holdings.items():
        for shard, one in held.items():
            if one.is_primary and (choices[shard].server, choices[shard].term) != (server, one.term):
                found.setdefault(server, []).append((shard, one.term))
    return found


class Copies:
    """The copies that are ordered. count: servers that hold each shard, its primary included."""

    def __init__(self, *, shards: int, count: int) -> None:
        self._shards = shards
        self._count = count
        self._ordered: dict[int, tuple[int, int]] = {}
        """By shard the server that is to have a copy, and the primary that was told so."""

    def forget(self) -> None:
        """A round begins: nothing is ordered."""
        self._ordered.clear()

    def lost(self, server: int) -> list[int]:
        """A server is lost: the shards of which it was to have copies."""
        gone = [shard for shard, order in self._ordered.items() if server in order]
        return [shard for shard in gone if self._ordered.pop(shard)[0] == server]

    def failed(self, shard: int) -> None:
        """The copy of a shard is lost; it is ordered again."""
        self._ordered.pop(shard, None)

    def place_of(self, shard: int, primary: int) -> int | None:
        """The server that is to have the copy of a shard: the first of its places that is not its primary's; None for no copy."""
        places = [(shard + step) % self._shards for step in range(self._count)]
        return next((place for place in places if place != primary), None)

    def wanted(self, primaries: list[int], there: Collection[int]) -> list[tuple[int, int, int]]:
        """(shard, primary, server) of the copies that are to be made now, among the servers that are there. They are ordered then."""
        orders = []
        for shard, primary in enumerate(primaries):
            place = self.place_of(shard, primary)
            if place is None or place not in there or primary not in there:
                continue
            if self._ordered.get(shard) != (place, primary):
                self._ordered[shard] = (place, primary)
                orders.append((shard, primary, place))
        return orders
