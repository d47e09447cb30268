"""The rounds of a training with parameter servers: when one begins, from which checkpoint, and when it is lost.

All shards share a round. It begins when every server is connected and the newest checkpoint is known; all shards begin from that
checkpoint.
When one server is lost, the round is lost: every shard goes back to the newest checkpoint.
A server that only lost its connection comes back in its round, and a new master takes over the round that all servers are in.
Pure.
"""

from collections.abc import Callable
from enum import Enum, auto

from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import resuming
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.store import name_of, shard_of
from disttrain_trainer.coordinator.servers import Servers
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import MessageType
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
    OPEN = auto()
    """Every server is in the round: the workers are invited."""


class Rounds:
    """One round after the other.

    newest: the newest complete checkpoint that is known. answered: called with what the store finds; it must lead to a call of `found`.
    opened: the round is open. returned: a server of the open round is back, and all are there. lost: a server came
    without its round.
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

    @property
    def open(self) -> bool:
        return self._phase is _Phase.OPEN

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
        self._phase = _Phase.GATHERING
        self._gather(now)

    def server_joined(self, now: float) -> None:
        """A server joined and reported its state."""
        if self._phase is _Phase.LOOKING:
            return  # a round that began now would ignore the newest checkpoint
        if self._phase is _Phase.GATHERING or self._same():
            self._gather(now)
        else:
            # A server without the present round: its shard is lost, and with it the round.
            self._start_over(now)

    def server_state(self, round_number: int, now: float) -> bool:
        """A server reported its round. False when the round ends or begins with this report, so that it answers no question in a round."""
        if self._phase in (_Phase.BEGINNING, _Phase.OPEN) and round_number > self.number:
            self._start_over(now)  # the last order of a master that is gone, carried out only now
            return False
        if self._phase is _Phase.BEGINNING:
            if self._servers.complete and self._same():
                self._open(now)
            return False
        return True

    def _same(self) -> bool:
        return self._servers.round_numbers <= {self.number}

    def _gather(self, now: float) -> None:
        """With every server connected: goes on with the round that all are in, or begins one."""
        if not self._servers.complete:
            return
        round_numbers = self._servers.round_numbers
        if len(round_numbers) > 1:
            self._start_over(now)
        elif 0 in round_numbers:
            self._begin()
        elif self._phase is _Phase.GATHERING:
            self._take_over(round_numbers.pop(), now)
        elif self._phase is _Phase.BEGINNING:
            self._open(now)  # the last one said so when it came back
        else:
            self._returned(now)

    def _take_over(self, round_number: int, now: float) -> None:
        """A new master takes over the servers' round. It does not know which workers were lost with the old master: it drops all.

        A worker gets its new lease only after every server has dropped it: a later DROP would end the new session.
        """
        self.number = round_number

        def dropped(_: IndexSet) -> None:
            if self._same():
                self._open(now)
            else:
                self._start_over(now)

        self._servers.ask(MessageType.DROP, dropped, now, ranks=list(range(self._config.world_size)))

    def _start_over(self, now: float) -> None:
        """The round is lost: back to the newest checkpoint."""
        log.warning("a server was lost: every shard goes back to the last checkpoint")
        self.number = max(self.number, *self._servers.round_numbers)
        self._servers.forget_rounds()
        self._lost(now)
        self.look(now)

    def _begin(self) -> None:
        self._phase = _Phase.BEGINNING
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
