"""A parameter server: shards behind a port, one thread for each connection.

`begin` starts a round, `save` writes a checkpoint's file, `drop` ends the session of a worker that the master declared lost. Any thread may
call them.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import ParameterServerStrategy
from disttrain.api.trainer import Loop
from disttrain_trainer.checkpoint.background import HostCopy
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.net.acceptor import Acceptor, PeerAddress
from disttrain_trainer.net.connection import Closed, Connection, Silent
from disttrain_trainer.net.frames import Header, Link, Op, ProtocolError, Reason, Refusal
from disttrain_trainer.net.transport import PLAIN, Transport
from disttrain_trainer.parameter_server.clipping_host import NormPart
from disttrain_trainer.parameter_server.copy_receiver import follow_on, receive_follow, receive_snapshot
from disttrain_trainer.parameter_server.copy_sender import CopySender
from disttrain_trainer.parameter_server.following import Follow
from disttrain_trainer.parameter_server.held_shards import HeldShards, Holding
from disttrain_trainer.parameter_server.host_factory import HostFactory
from disttrain_trainer.parameter_server.identity import MAX_HELLO, Hello, config_digest
from disttrain_trainer.parameter_server.optimizer import Optimizer, settings_of
from disttrain_trainer.parameter_server.replicated_host import ReplicatedHost
from disttrain_trainer.parameter_server.requests import Requests
from disttrain_trainer.parameter_server.saving import SavedShard, write
from disttrain_trainer.parameter_server.sessions import Session
from disttrain_trainer.parameter_server.shard_file import ShardFile
from disttrain_trainer.parameter_server.shard_host import ShardHost
from disttrain_trainer.parameter_server.shard_state import ShardState, together
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.sockets import own_port

log = logs.get_logger(__name__)

STRANGERS = 64
"""Connections without a HELLO yet, in addition to one for each worker."""
HEARTBEAT_SECONDS = 0.5
"""Seconds between two signs of life to a worker that waits, and until its own death in the wait is noticed."""


class _Connection:
    """One accepted connection."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.session: Session | None = None
        self.host: ShardHost | None = None
        self.shard: int | None = None


class ShardServer:
    """Server number `index` of the job, on host:port (None: every address of the machine; port 0: any free one). It
    begins each round with the shard of its own number, and may hold others.

    optimizer: makes the optimiser of each round. Default: what the job names.
    on_staleness: called with each gradient's staleness, the versions between the parameters that it is of and those it is applied to;
        the shard stands still meanwhile.
    on_sum: called when `norm_parts` has something new; a shard stands still meanwhile.
    on_failure: called with an exception of this server itself: the process must end, for its shard may be half changed.
        Default: the thread raises it.
    """

    def __init__(
        self,
        *,
        config: JobConfig,
        index: int,
        host: str | None,
        port: int,
        optimizer: Callable[[], Optimizer] | None = None,
        on_staleness: Callable[[int], None] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
        on_sum: Callable[[], None] = lambda: None,
        transport: Transport = PLAIN,
    ) -> None:
        loop, strategy = config.trainer.work, config.strategy.exchange
        if not (isinstance(loop, Loop) and isinstance(strategy, ParameterServerStrategy)):
            raise WrongInput("a parameter server needs strategy.parameterServer and trainer.optimizer")
        self._config = config
        self._index = index
        self._bind = (host, port)
        self._hosts = HostFactory(
            config,
            strategy,
            optimizer=optimizer or (lambda: Optimizer(settings_of(strategy, loop.optimizer))),
            on_staleness=on_staleness,
            on_sum=on_sum,
        )
        self._on_failure = on_failure
        self._transport = transport
        self._digest = config_digest(config)
        self._changed = threading.Condition()
        self._held = HeldShards(self._changed)
        self._connections: set[_Connection] = set()
        self._incarnations: dict[int, str] = {}
        self._retired: set[str] = set()
        self._bytes = [0, 0]  # of connections that have ended
        self._memory: dict[int, HostCopy] = {}
        self._acceptor: Acceptor | None = None
        self._address = ""
        self._stopped = False

    @property
    def address(self) -> str:
        """host:port, after `start`."""
        if not self._address:
            raise RuntimeError("the server was not started")
        return self._address

    @property
    def connections(self) -> int:
        """How many are open, of workers and of strangers."""
        return len(self._connections)

    def start(self) -> None:
        """Listens. Workers that come before `begin` wait. Raises PeerLost when the port is taken.

        Sets torch to one thread for an operation, in the whole process: connections run in parallel already, and a block that several
        threads divide is not bitwise the same everywhere (`optimizer.py`).
        """
        torch.set_num_threads(1)
        listener = own_port("the parameter server", *self._bind)
        host, port = listener.getsockname()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._acceptor = Acceptor(
            listener,
            self._guarded,
            who=f"parameter-server-{self._index}",
            transport=self._transport,
            timeout=self._config.peer_timeout_seconds,
            handshake_seconds=self._config.peer_timeout_seconds,
            strangers=STRANGERS + self._config.world_size,
            beside=self._transport.listen_beside(listener),
        )
        self._acceptor.start()

    def begin(self, round_number: int, checkpoint: Path | None = None) -> None:
        """Starts a round, from this file or with no parameters; the round before it is over, and its workers are refused.

        Raises WrongInput when the file is damaged or does not fit the job; then the old round goes on. ValueError when the
        round is not a later one.
        """
        file = None if checkpoint is None else self._hosts.load(checkpoint, self._index)
        try:
            new = self._hosts.primary(round_number, self._index, file)
        except WrongInput as error:
            raise WrongInput(f"{checkpoint}: {error}" if checkpoint else str(error)) from None
        self._end(self._held.begin(round_number, self._index, new))

    def _end(self, over: list[ReplicatedHost]) -> None:
        """These shards are not served any more: their workers get to know it."""
        with self._changed:
            former = [c for c in self._connections if c.host in over]
        for host in over:
            host.end()
        for connection in former:
            connection.link.stop_reading()

    @property
    def primaries(self) -> tuple[int, ...]:
        """The shards that this server serves to workers."""
        return self._held.primaries

    @property
    def round_number(self) -> int:
        """Of the present round; 0 before the first."""
        return self._held.round_number

    @property
    def holdings(self) -> list[Holding]:
        """The shards that it holds, as their primary or as a copy."""
        return self._held.holdings

    @property
    def newest_version(self) -> int:
        """Of the shards that it holds, as their primary or as a copy; 0 for none."""
        return self._held.newest_version

    def promote(self, terms: Iterable[tuple[int, int]]) -> None:
        """Copies become primaries: shards and their new terms."""
        self._held.promote(terms)
        with self._changed:
            served = [self._held.served(shard) for shard, _ in terms]
            former = [c for c in self._connections if c.session is None and c.host is not None and c.host in served]
        for connection in former:  # from the primary that was before
            connection.link.abort()

    def discard(self, shards: Iterable[tuple[int, int]]) -> None:
        """Primaries that were replaced while this server was away: shards and their terms."""
        self._end(self._held.discard(shards))

    def replicate(self, shard: int, server: int, address: str, changed: Callable[[int, bool], None]) -> None:
        """Keeps a copy of a shard on another server, which listens there. changed: called with the shard's term when the copy is complete
        (True) or lost. A shard that is not served here has none."""
        host = self._held.served(shard)
        if host is None:
            return
        term = host.term
        sender = CopySender(
            host,
            shard=shard,
            config=self._config,
            own=self._index,
            server=server,
            address=address,
            transport=self._transport,
            changed=lambda complete: changed(term, complete),
        )
        self._held.replicate(shard, sender)

    def stop_copying(self, shard: int) -> None:
        """The shard goes on without a copy."""
        self._held.replicate(shard, None)

    def snapshot(
        self, shard: int | None = None, *, step: int | None = None, wanted: Callable[[], bool] = lambda: True
    ) -> ShardFile:
        """A copy of the current version of a shard, by default of the one of this server's number; until the next call: the memory is used
        again. Training stands still only meanwhile. step, wanted: see ShardHost.

        Raises RuntimeError when there are no parameters yet.
        """
        number = self._index if shard is None else shard
        host = self._held.served(number)
        if host is None:
            raise RuntimeError("no round has begun")
        try:
            return host.snapshot(self._memory.setdefault(number, HostCopy()), step, wanted)
        except Refusal as error:
            raise RuntimeError(error.text) from None

    def save(self, path: Path) -> SavedShard:
        """Copies the current version and writes the copy; see `snapshot` and `write`."""
        return write(self.snapshot(), path)

    def state(self) -> ShardState:
        """The server now."""
        hosts = self._held.hosts
        with self._changed:
            links = [connection.link for connection in self._connections]
            bytes_in = self._bytes[0] + sum(link.received for link in links)
            bytes_out = self._bytes[1] + sum(link.sent for link in links)
        state = together([host.state() for host in hosts])
        late = self._held.late + state.late_gradients
        bytes_out += self._held.bytes_copied
        return replace(state, bytes_in=bytes_in, bytes_out=bytes_out, late_gradients=late)

    def norm_parts(self) -> list[NormPart]:
        """What the master needs for the norms of the gradients of steps, of the shards that are served here."""
        return [part for host in self._held.hosts if (part := host.norm_part()) is not None]

    def take_norm(self, round_number: int, version: int, norm: float) -> None:
        """The norm of the gradient of the step that makes this version: the shards that wait for it make the step."""
        for host in self._held.hosts:
            if host.number == round_number:
                host.take_norm(version, norm)

    def drop(self, worker_rank: int) -> None:
        """Ends the worker's connection and waits for it no more; it may connect again."""
        with self._changed:
            dropped = [c for c in self._connections if c.session is not None and c.session.rank == worker_rank]
        for connection in dropped:
            if connection.host is not None and connection.session is not None:
                connection.host.exit(connection.session)
            connection.link.abort()

    def stop(self) -> None:
        """Ends the round, all connections, and the listener."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._held.end()
        if self._acceptor is not None:
            self._acceptor.close()

    def _guarded(self, accepted: Connection, peer: PeerAddress) -> bool:
        try:
            self._serve(accepted, peer)
        except Exception as error:
            if self._on_failure is None:
                raise
            self._on_failure(error)
        return False

    def _serve(self, accepted: Connection, peer: PeerAddress) -> None:
        """One connection, from HELLO to its end."""
        connection = _Connection(Link(accepted))
        with self._changed:
            self._connections.add(connection)
        said_goodbye = False
        try:
            header = connection.link.receive()
            if header.op is Op.FOLLOW:
                self._follow(connection, accepted, receive_follow(connection.link, header))
                return
            hello = self._hello(connection.link, header)
            if self._acceptor is not None:
                self._acceptor.known(accepted)
            host, session = self._admit(connection, hello)
            said_goodbye = Requests(
                link=connection.link,
                host=host,
                session=session,
                timeout_seconds=self._config.startup_timeout_seconds,
                heartbeat_seconds=min(hello.timeout_seconds / 4, HEARTBEAT_SECONDS),
                members=self._config.strategy.model_parallel_size,
            ).serve()
        except Refusal as refusal:
            _refuse(connection.link, refusal.reason, refusal.text)
        except ProtocolError as error:
            log.warning("parameter-server-%d closes the connection from %s: %s", self._index, peer, error)
            _refuse(connection.link, Reason.MISTAKE, str(error))
        except (Closed, Silent):
            if (former := connection.host) is not None and former.over:
                _refuse(connection.link, Reason.ROUND, f"round {former.number} is over")
        finally:
            self._forget(connection, said_goodbye)

    def _follow(self, connection: _Connection, accepted: Connection, follow: Follow) -> None:
        """The connection of the primary of a shard that is to have a copy here."""
        self._refuse_strangers(follow, f"parameter-server-{follow.server}")
        if self._acceptor is not None:
            self._acceptor.known(accepted)
        file, kept = receive_snapshot(connection.link, follow)
        try:
            host = self._hosts.copy(follow.round_number, follow.shard, file, follow.term, follow.groups)
        except WrongInput as error:
            raise Refusal(Reason.LAYOUT, str(error)) from None
        host.restore_beside(kept, first=follow.first, norm=follow.norm)
        self._end(self._held.place_copy(follow.round_number, follow.shard, host))
        connection.host = host
        follow_on(connection.link, host, timeout_seconds=self._config.peer_timeout_seconds)

    def _hello(self, link: Link, header: Header) -> Hello:
        if header.op is not Op.HELLO:
            raise ProtocolError(f"a connection begins with HELLO, not {header.op.name}")
        hello = Hello.decode(link.receive_bytes(header, most=MAX_HELLO))
        self._refuse_strangers(hello, f"worker {hello.rank}")
        return hello

    def _refuse_strangers(self, peer: Hello | Follow, name: str) -> None:
        for what, theirs, ours in (
            ("job", peer.job_uid, self._config.uid),
            ("attempt", peer.attempt, self._config.attempt),
            ("configuration", peer.config_digest, self._digest),
            ("a job of so many shards:", peer.shards, self._config.parameter_servers),
        ):
            if theirs != ours:
                raise Refusal(Reason.STRANGER, f"{name} is of {what} {theirs}, this server of {ours}")
        if peer.shard >= peer.shards:
            raise ProtocolError(f"there is no shard {peer.shard} of {peer.shards}")

    def _admit(self, connection: _Connection, hello: Hello) -> tuple[ShardHost, Session]:
        self._await_round(connection.link, hello)
        with self._changed:
            host = self._held.served(hello.shard)
            if host is None or host.number != hello.round_number:
                raise Refusal(Reason.ROUND, f"round {hello.round_number} is over")
            if hello.incarnation in self._retired:
                raise Refusal(Reason.STRANGER, f"worker {hello.rank} was replaced by a newer incarnation")
            before = self._incarnations.get(hello.rank)
            if before is not None and before != hello.incarnation:
                self._retired.add(before)
            self._incarnations[hello.rank] = hello.incarnation
            session = Session(hello.rank, hello.incarnation)
            version, initialized = host.enter(session, hello.layout, total_steps=hello.total_steps, groups=hello.groups)
            replaced = [
                c
                for c in self._connections
                if c.session is not None
                and c.session.rank == hello.rank
                and (c.host is host or c.session.incarnation != hello.incarnation)  # it asks for other shards, too
            ]
            connection.session, connection.host, connection.shard = session, host, hello.shard
        for old in replaced:
            old.link.abort()
        connection.link.send(Header(op=Op.WELCOME, code=initialized, version=version))
        return host, session

    def _await_round(self, link: Link, hello: Hello) -> None:
        """Waits for the round, and for the shard: a worker may learn of both before its servers do."""
        begin, timeout_seconds = time.monotonic(), self._config.startup_timeout_seconds
        heartbeat_seconds = min(hello.timeout_seconds / 4, HEARTBEAT_SECONDS)
        reason = f"round {hello.round_number} to begin on server {self._index}"

        def begun() -> bool:
            here = self.round_number == hello.round_number and hello.shard in self.primaries
            return self._stopped or self.round_number > hello.round_number or here

        while True:
            with self._changed:
                if self._changed.wait_for(begun, heartbeat_seconds):
                    return
            if time.monotonic() - begin >= timeout_seconds:
                raise Refusal(Reason.TIMEOUT, f"waited {timeout_seconds:g} s for {reason}")
            link.send_text(Header(op=Op.WAIT), reason)

    def _forget(self, connection: _Connection, said_goodbye: bool) -> None:
        session, host = connection.session, connection.host
        with self._changed:
            self._connections.discard(connection)
            self._bytes[0] += connection.link.received
            self._bytes[1] += connection.link.sent
            current = host is not None and not host.over and not self._stopped
        connection.link.close()
        if session is None or host is None:
            return
        was_here = host.exit(session)
        if was_here and current and not said_goodbye:
            log.info("shard %d lost worker %d on parameter-server-%d", connection.shard, session.rank, self._index)


def _refuse(link: Link, reason: Reason, text: str) -> None:
    with contextlib.suppress(Closed, Silent):
        link.send_text(Header(op=Op.REFUSED, code=reason), text)
