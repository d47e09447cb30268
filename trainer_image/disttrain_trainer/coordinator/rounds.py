"""The rounds of a training with parameter servers: when one begins, from which checkpoint, and when it is lost.

All shards share a round. It begins when every server is connected and the newest checkpoint is known; all shards begin from that
checkpoint. When a server is lost whose shards have complete copies, these take their places in the same round (shard_copies.py). Otherwise
the round is lost: every shard goes back to the newest checkpoint. A server that only lost its connection comes back in its round, and a new
master takes over the round of the servers. Pure.
"""

from collections.abc import Callable
from enum import Enum, auto

from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import resuming
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.store import name_of, shard_of
from disttrain_trainer.coordinator.servers import Servers
from disttrain_trainer.coordinator.shard_copies import Choice, Copies, choose
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Answer, CheckpointStore, Member, Sender
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

AtTime = Callable[[float], None]
"""Called with the time."""


class _Phase(Enum):
    LOOKING = auto()
    """For the newest checkpoint."""
    GATHERING = auto()
    """A server is missing."""
    BEGINNING = auto()
    """The servers load the checkpoint."""
    TAKING_OVER = auto()
    """The primaries drop all workers, and say what they hold."""
    OPEN = auto()
    """Every server is in the round: the workers are invited."""


class Rounds:
    """One round after the other.

    newest: the newest complete checkpoint that is known. answered: called with what the store finds; it must lead to a call of `found`.
    opened: the round is open. returned: a primary of the open round is back, and all are there. lost: the workers must leave the round: a
    server came without its shards, or others serve them now.
    """

    def __init__(
        self,
        *,
        sender: Sender,
        servers: Servers,
        store: CheckpointStore | None,
        newest: Callable[[], Manifest | None],
        answered: Answer[Manifest | None],
        config: JobConfig,
        opened: AtTime,
        returned: AtTime,
        lost: AtTime,
    ) -> None:
        self._sender = sender
        self._servers = servers
        self._store = store
        self._newest = newest
        self._answered = answered
        self._config = config
        self._opened = opened
        self._returned = returned
        self._lost = lost
        self._phase = _Phase.LOOKING
        self.number = 0
        """Of the present round, or of the last one."""
        self._copies = Copies(shards=servers.count, count=config.replication)
        self._is_new = True
        """This master has not led a round: it knows of the servers only what they say."""
        self.is_inherited = False
        """A master before this one began the present round."""
        self._gathering_since = 0.0
        self.promotions = 0
        """How often copies took the places of lost servers."""

    @property
    def open(self) -> bool:
        return self._phase is _Phase.OPEN

    @property
    def taking_over(self) -> bool:
        """Whether other servers take the places of lost ones, or a new master those of the one before: then the round opens, or is lost."""
        return self._phase is _Phase.TAKING_OVER

    def look(self, now: float) -> None:
        """Looks for the newest checkpoint, from which the next round begins."""
        self._phase = _Phase.LOOKING
        if self._store is not None:
            self._store.find(self._answered)
        else:
            log.info("there is no checkpoint volume: if a server is lost, the training starts again at step 0")
            self.found(now)

    def found(self, now: float) -> None:
        """The checkpoint store answered: `newest` is up to date."""
        self._phase, self._gathering_since = _Phase.GATHERING, now
        self._gather(now)

    def server_joined(self, index: int, now: float) -> None:
        """A server joined and reported its state."""
        match self._phase:
            case _Phase.GATHERING:
                self._gather(now)
            case _Phase.BEGINNING if not self._same():
                self._start_over(now)
            case _Phase.BEGINNING if self._servers.complete:
                self._open(now)  # the last one said so when it came back
            case _Phase.OPEN | _Phase.TAKING_OVER if index not in self._servers.primaries:
                self._spare_joined(index, now)
            case _Phase.OPEN if not self._same() or not self._servers.serves(index):
                # A server without its shards: they are lost, and with them the round.
                self._start_over(now)
            case _Phase.OPEN:
                self._servers.distrust_copies(index)
                self._servers.discard_others(index)
                if self._servers.complete:
                    self._returned(now)
                self._order_copies()

    def server_lost(self, index: int, now: float) -> None:
        """The connection of a server ended. Others serve its shards from now on if they can; otherwise it may come back with them."""
        for shard in self._copies.lost(index):
            self._servers.send(self._servers.primaries[shard], MessageType.REPLICATE, shard=shard, server=None)
        if self._phase is _Phase.TAKING_OVER and index in self._servers.primaries:
            self._phase = _Phase.GATHERING
        if self._phase is _Phase.GATHERING:
            self._gather(now)
        elif self._phase is _Phase.OPEN and index in self._servers.primaries:
            choices = self._choose(self.number)
            if choices is not None:
                self.promotions += 1
                log.warning("parameter-server-%d is lost; the copies of its shards take their places", index)
                self._phase = _Phase.TAKING_OVER
                self._lost(now)
                self._take_over(self.number, choices, now)

    def copy_changed(self, message: Message, now: float) -> None:
        """A primary said that its copy is complete, or lost."""
        if self._is_led and self._servers.know_copy(message, self.number) and not message["complete"]:
            self._copies.failed(int(message["shard"]))  # it is ordered again with the next tick

    def tick(self, now: float) -> None:
        """Time has passed: copies that are missing are ordered, and a new master waits no longer for a server that the others replace."""
        if self._phase is _Phase.GATHERING:
            self._gather(now)
        elif self._phase is _Phase.OPEN:
            self._order_copies()

    def server_state(self, index: int, round_number: int, now: float) -> bool:
        """A server reported its round. False when the round ends or begins with this report, so that it answers no question in a round."""
        leads = self._phase in (_Phase.BEGINNING, _Phase.OPEN, _Phase.TAKING_OVER)
        if leads and round_number > self.number:
            self._start_over(now)  # the last order of a master that is gone, carried out only now
            return False
        if self._phase is _Phase.BEGINNING:
            if self._servers.complete and self._same():
                self._open(now)
            return False
        if leads and round_number == self.number:
            self._servers.discard_others(index)
        return True

    @property
    def _is_led(self) -> bool:
        """Whether the servers are in this master's round, which may lack a primary."""
        gathering = self._phase is _Phase.GATHERING and self._servers.newest_round == self.number
        return gathering or self._phase in (_Phase.OPEN, _Phase.TAKING_OVER)

    def _same(self) -> bool:
        return self._servers.round_numbers <= {self.number}

    def _choose(self, round_number: int) -> list[Choice] | None:
        return choose(self._servers.holdings(round_number), shards=self._servers.count)

    def _gather(self, now: float) -> None:
        """Goes on with the round of the servers, or begins one. Who knows what each of them had needs only those with the shards."""
        all_here = self._servers.all_here
        late = now - self._gathering_since > self._config.peer_timeout_seconds
        if not all_here and (self._config.replication == 1 or (self._is_new and not late)):
            return
        newest = self._servers.newest_round
        choices = self._choose(newest) if newest else None
        if choices is not None:
            self._take_over(newest, choices, now)
        elif all_here and newest:
            self._start_over(now)
        elif all_here:
            self._begin()

    def _spare_joined(self, index: int, now: float) -> None:
        """A server that serves no shard: it gets copies. What it had is out of date."""
        stale = [(shard, one.term) for shard, one in self._servers.held(index).items() if one.is_primary]
        if stale:
            self._servers.send(index, MessageType.DISCARD, shards=stale)
        self._servers.hold_nothing(index)
        self._order_copies()

    def _order_copies(self) -> None:
        if self._phase is not _Phase.OPEN or self._config.replication == 1:
            return
        for shard, primary, server in self._copies.wanted(self._servers.primaries, self._servers.there):
            self._servers.forget_copies(shard)
            self._servers.send(primary, MessageType.REPLICATE, shard=shard, server=server)

    def _take_over(self, round_number: int, choices: list[Choice], now: float) -> None:
        """Goes on with the servers' round. Workers that were lost with an old master are not known: all are dropped.

        A worker gets its new lease only after every server has dropped it: a later DROP would end the new session.
        """
        if self._is_new:
            self._copies.forget()  # whether they follow on is not known
            self.is_inherited = True
        self._phase, self.number, self._is_new = _Phase.TAKING_OVER, round_number, False
        self._servers.take(choices, round_number)

        def dropped(_: IndexSet) -> None:
            # A shard of Sync may be a step ahead of the others. A copy that is further behind did not follow on.
            behind = self._config.strategy.synchronous and self._servers.apart(self._config.parts_per_step) > 1
            if self._same() and not behind:
                self._open(now)
            else:
                self._start_over(now)

        self._servers.ask(MessageType.DROP, dropped, now, ranks=list(range(self._config.data_parallel_size)))

    def roll_back(self, now: float) -> None:
        """The loss was not finite: the round is given up."""
        if self._phase is _Phase.OPEN:
            self._start_over(now, "the loss is not finite")

    def _start_over(self, now: float, why: str = "a server was lost") -> None:
        """The round is lost: back to the newest checkpoint."""
        log.warning("%s: every shard goes back to the last checkpoint", why)
        self.number = max(self.number, self._servers.newest_round)
        self._servers.forget_rounds()
        self._phase = _Phase.LOOKING
        self._lost(now)
        self.look(now)

    def _begin(self) -> None:
        self._phase, self._is_new, self.is_inherited = _Phase.BEGINNING, False, False
        self._servers.serve_own()
        self._copies.forget()
        self.number += 1
        newest = self._newest()
        # Of another number of servers, consistency or strategy: each server takes its part by the names of the tensors.
        fits = newest is not None and resuming.same_cut(newest.state, self._config)
        for index in range(self._servers.count):
            name = newest.file_of(shard_of(index)) if newest else None
            file = (f"{name_of(newest.step)}/{name}" if fits else name_of(newest.step)) if newest else None
            server = Member(Role.PARAMETER_SERVER, index)
            self._sender.send(server, MessageType.BEGIN, generation=self.number, file=file)

    def _open(self, now: float) -> None:
        self._phase = _Phase.OPEN
        self._opened(now)
        self._order_copies()
