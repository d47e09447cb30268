"""What a worker of parameter servers, or the first rank of a group of them, keeps from round to round, and how it leaves one that is over.

Not here: what it does in a round (push_pull.py, group_exchange.py).
"""

import time
from typing import Protocol

from disttrain_trainer.errors import PeerLost
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import Client, Round
from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

RETRY_SECONDS = 0.2
"""Seconds before a worker asks for another round when one broke and the master did not end it."""


class Served(Protocol):
    """What the master knows of the worker; under the lock of its control connection."""

    round: Round | None
    client: Client | None
    """The connections of the round that goes on, None between two."""


class ServedRounds:
    """The rounds of one worker. For its training thread; `bytes_moved` for any."""

    def __init__(self, control: ControlClient, member: Served, *, timeout: float) -> None:
        """timeout: seconds without a part that is done, after which a broken round is an error."""
        self._control = control
        self._member = member
        self._timeout = timeout
        self.clock = 0
        """Iterations completed in the newest round."""
        self._moved = time.monotonic()
        """When a part was last done."""
        self._moved_bytes = (0, 0)
        """Sent and received by connections that are closed."""

    def note_part(self) -> None:
        """A part is done."""
        self._moved = time.monotonic()

    def broke(self, this_round: Round, error: PeerLost) -> None:
        """A server is lost, or the master ended the round: asks for the next one. Raises the error when no part was done for too long."""
        control, member = self._control, self._member
        with control.changed:
            if member.round is not this_round:
                return
            log.warning("%s", error)
            if time.monotonic() - self._moved > self._timeout:
                raise error
            control.changed.wait_for(lambda: member.round is not this_round, RETRY_SECONDS)
            if member.round is this_round:
                member.round = None

    def over(self, this_round: Round, seconds: float) -> bool:
        """Waits so long between two tries of the model's file; whether the round is over."""
        control, member = self._control, self._member
        with control.changed:
            control.changed.wait_for(lambda: member.round is not this_round, seconds)
        control.check()
        return member.round is not this_round

    def left(self, client: ShardedClient) -> None:
        """The round of these connections is over. Call it under the lock, in the moment in which the member has them no more: their
        bytes are in one of the two, never in both."""
        self.clock = client.clock
        sent, received = self._moved_bytes
        self._moved_bytes = (sent + client.bytes_sent, received + client.bytes_received)

    def bytes_moved(self) -> tuple[int, int]:
        """Bytes sent to servers and received from them, in all rounds."""
        with self._control.changed:
            client = self._member.client
            sent, received = self._moved_bytes
            if client is not None:
                sent, received = sent + client.bytes_sent, received + client.bytes_received
        return sent, received
