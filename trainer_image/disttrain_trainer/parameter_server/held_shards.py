"""The shards that one server holds in a round, as their primary or as a copy (docs/design/0011)."""

import threading
from collections.abc import Iterable
from typing import NamedTuple

from disttrain_trainer.net.frames import Reason, Refusal
from disttrain_trainer.parameter_server.copy_sender import CopySender
from disttrain_trainer.parameter_server.replicated_host import ReplicatedHost
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)


class Holding(NamedTuple):
    """A shard that a server holds, as it tells a new master."""

    shard: int
    term: int
    is_primary: bool
    complete: bool
    """Whether a copy may be promoted."""


class HeldShards:
    """Any thread may call any method; `changed` is the server's condition, which is notified when a shard can be served."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self.round_number = 0
        """The newest one; 0 before the first."""
        self._hosts: dict[int, ReplicatedHost] = {}
        self._senders: dict[int, CopySender] = {}
        self.late = 0
        """Gradients that were ignored by shards that are not held any more."""

    @property
    def primaries(self) -> tuple[int, ...]:
        """The shards that are served to workers."""
        return tuple(shard for shard, host in sorted(self._hosts.items()) if host.is_primary and not host.over)

    @property
    def holdings(self) -> list[Holding]:
        """All of them."""
        hosts = sorted(self._hosts.items())
        return [Holding(shard, host.term, host.is_primary, host.complete) for shard, host in hosts if not host.over]

    @property
    def hosts(self) -> list[ReplicatedHost]:
        """Of the primaries."""
        with self._changed:
            return [self._hosts[shard] for shard in self.primaries]

    @property
    def newest_version(self) -> int:
        """Of the shards that it serves or holds a copy of; 0 for none."""
        with self._changed:
            hosts = list(self._hosts.values())
        return max((host.state().version for host in hosts), default=0)

    @property
    def bytes_copied(self) -> int:
        """Bytes sent to the copies that there are now."""
        return sum(sender.bytes_sent for sender in list(self._senders.values()))

    def served(self, shard: int) -> ReplicatedHost | None:
        """The shard, if this server is its primary."""
        host = self._hosts.get(shard)
        return host if host is not None and host.is_primary else None

    def begin(self, round_number: int, shard: int, host: ReplicatedHost) -> list[ReplicatedHost]:
        """A round begins with this one; returns those that are over. ValueError when the round is not a later one."""
        with self._changed:
            if round_number <= self.round_number:
                raise ValueError(f"round {round_number} cannot follow {self.round_number}")
            return self._go_to(round_number, {shard: host})

    def place_copy(self, round_number: int, shard: int, host: ReplicatedHost) -> list[ReplicatedHost]:
        """A copy is here; returns what is over for it. Refuses one of an earlier round or term."""
        with self._changed:
            if round_number < self.round_number:
                raise Refusal(Reason.ROUND, f"round {round_number} is over")
            over = self._go_to(round_number, {}) if round_number > self.round_number else []
            before = self._hosts.get(shard)
            if before is not None and (before.term, before.is_primary) > (host.term, False):
                raise Refusal(Reason.STRANGER, f"shard {shard} has a primary of term {before.term} here")
            if before is not None:
                over.append(self._take_away(shard))
            self._hosts[shard] = host
            return over

    def promote(self, terms: Iterable[tuple[int, int]]) -> None:
        """The copies of these shards are primaries from now on, with these terms. A shard that is not here, or is one already, stays."""
        with self._changed:
            for shard, term in terms:
                host = self._hosts.get(shard)
                if host is not None and not host.is_primary:
                    host.promote(term)
                    log.info("this server is the primary of shard %d now, term %d", shard, term)
            self._changed.notify_all()

    def discard(self, shards: Iterable[tuple[int, int]]) -> list[ReplicatedHost]:
        """Primaries of these shards and terms that are replaced; returns those that are over."""
        with self._changed:
            return [
                self._take_away(shard)
                for shard, term in shards
                if (host := self._hosts.get(shard)) is not None and host.is_primary and host.term == term
            ]

    def replicate(self, shard: int, sender: CopySender | None) -> None:
        """The shard's copy is kept by this sender, which is started, or by none; that before is stopped."""
        with self._changed:
            before = self._senders.pop(shard, None)
            if sender is not None:
                self._senders[shard] = sender
        if before is not None:
            before.stop()
        if sender is not None:
            sender.start()

    def end(self) -> None:
        """All are over."""
        with self._changed:
            for shard in list(self._hosts):
                self._take_away(shard).end()

    def _go_to(self, round_number: int, hosts: dict[int, ReplicatedHost]) -> list[ReplicatedHost]:
        over = [self._take_away(shard) for shard in list(self._hosts)]
        self.round_number, self._hosts = round_number, hosts
        self._changed.notify_all()
        return over

    def _take_away(self, shard: int) -> ReplicatedHost:
        host, sender = self._hosts.pop(shard), self._senders.pop(shard, None)
        if sender is not None:
            sender.stop()
        self.late += host.state().late_gradients
        return host
