"""The master's end of the control connections: admits processes, receives their messages, notices when one is lost.

One asyncio loop calls the coordinator, so that no two calls overlap. A process is lost when its connection ends, or when it was silent
for the peer timeout. A malformed message costs its sender the connection; an exception of the coordinator ends the master, because its
state is then unknown.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from disttrain.api.names import Role
from disttrain.api.runtime import MOST_PODS_REPORTED, JobConfig, RestartsInPlace
from disttrain_trainer.net import incoming
from disttrain_trainer.net.attempt_code import AttemptCode
from disttrain_trainer.net.connection import Unverified
from disttrain_trainer.net.incoming import Hello
from disttrain_trainer.net.joining import Judge
from disttrain_trainer.net.messages import MAX_LINE, Message, MessageType, beat_interval, decode, encode
from disttrain_trainer.net.peers import Coordinator, Member
from disttrain_trainer.net.transport import PLAIN, Refusals, Transport, hold_back, verify
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.sockets import BACKLOG, Newcomers, own_port

log = logs.get_logger(__name__)

STRANGERS = 64
"""Connections without a HELLO yet, in addition to one for each process of the job."""
ACCEPTED_AT_ONCE = 64
"""Connections that are accepted before those that came earlier are looked at."""
MAX_SESSIONS = 1024
"""Connections of `session.report`, beside one for each process of the job: a script may start more processes, and they may stay."""
MAX_UNSENT = 8 << 20
"""Bytes that may wait for a process that does not read; then its connection is closed."""


@dataclass(eq=False, slots=True)
class _Peer:
    member: Member
    incarnation: str
    writer: asyncio.StreamWriter
    last_message_at: float
    code: str | None = None


class ControlServer:
    """The control server. `coordinator` is set before `serve`."""

    coordinator: Coordinator

    def __init__(
        self,
        *,
        config: JobConfig,
        clock: Callable[[], float] = time.monotonic,
        transport: Transport = PLAIN,
        judge: Judge | None = None,
    ) -> None:
        """judge: of join tokens; None: each process is believed."""
        self._config = config
        self._context = transport.context
        self._refusals = Refusals("the master")
        self._judge = judge or Judge(b"", config.processes_per_worker)
        self._clock = clock
        self._peers: dict[Member, _Peer] = {}
        self._newest: dict[Member, str] = {}
        self._retired: set[str] = set()
        self._code = AttemptCode(config.code_origin)
        self._restarts: dict[str, RestartsInPlace] = {}
        self._failure: Exception | None = None
        self._failed = asyncio.Event()
        self._changed = asyncio.Event()
        self._conversations: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        processes = config.world_size + config.parameter_servers
        self._newcomers: Newcomers[asyncio.StreamWriter] = Newcomers(
            # Not by abort(): asyncio takes a connection that is aborted in its handshake for one that is made.
            STRANGERS + processes,
            lambda writer: self._conversations[writer].cancel(),
        )
        self._sessions: Newcomers[asyncio.StreamWriter] = Newcomers(MAX_SESSIONS + processes, _abort)

    @property
    def restarts_in_place(self) -> tuple[RestartsInPlace, ...]:
        """What the processes said of each pod, the newest first. Called by any thread."""
        restarts = sorted(tuple(self._restarts.values()), key=lambda one: one.time, reverse=True)
        return tuple(restarts[:MOST_PODS_REPORTED])

    @property
    def connected(self) -> int:
        """Processes that are connected now."""
        return len(self._peers)

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        """Sends, if the member is connected; never blocks."""
        peer = self._peers.get(member)
        if peer is None:
            return
        peer.writer.write(encode(kind, **fields))
        if peer.writer.transport.get_write_buffer_size() > MAX_UNSENT:
            log.warning("%s does not read what the master sends; the master closes its connection", member)
            peer.writer.transport.abort()

    def report(self, rank: int, message: Message) -> None:
        """A report of a user's program that came in another way than by a connection. Called by the loop's thread."""
        with self._deciding():
            self.coordinator.reported(rank, message, self._clock())

    def poke(self) -> None:
        """The state changed: `until` tests its condition again."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when the condition holds; it is tested after every message."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def serve(self, *, host: str | None, port: int) -> None:
        """Serves until cancelled. Raises PeerLost when the port is taken, and whatever a coordinator raises."""
        listener = own_port("the master", host, port)
        server = await asyncio.start_server(self._accept, sock=listener, limit=MAX_LINE, backlog=ACCEPTED_AT_ONCE)
        listener.listen(BACKLOG)  # asyncio takes one number for both
        async with server:
            beats, failed = asyncio.create_task(self._beat()), asyncio.create_task(self._failed.wait())
            try:
                await asyncio.wait([beats, failed], return_when=asyncio.FIRST_COMPLETED)
                if self._failure is not None:
                    raise self._failure
                beats.result()
            finally:
                beats.cancel()
                failed.cancel()
                for peer in list(self._peers.values()):
                    peer.writer.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hold_back(writer)
        # The task that asyncio itself would make logs a traceback when it is cancelled, as at the end of the loop (until Python 3.12).
        task = self._conversations[writer] = asyncio.create_task(self._hold(reader, writer))
        self._newcomers.add(writer)
        task.add_done_callback(lambda _: self._close(writer))

    def _close(self, writer: asyncio.StreamWriter) -> None:
        self._newcomers.discard(writer)
        del self._conversations[writer]
        writer.close()

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await verify(writer, self._context, within=self._config.peer_timeout_seconds)
            line = await asyncio.wait_for(reader.readline(), self._config.peer_timeout_seconds)
            self._newcomers.discard(writer)
            if line:
                await self._converse(decode(line), reader, writer)
        except Unverified as error:
            self._refusals.note(writer.get_extra_info("peername"), error)
        except (OSError, ValueError, TimeoutError) as error:  # the connection broke, or this is no process of ours
            log.debug("a connection ended: %s", error)
        except Exception as error:
            self._fail(error)

    async def _converse(self, first: Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = incoming.parse_hello(first)
        except ValueError as error:
            reason = f"this is the control port of a DistTrain master, which cannot read this HELLO: {error}"
            writer.write(encode(MessageType.REFUSED, reason=reason, final=False))
            return
        unfit = self._unfit(hello) or self._judge.objection(Role(hello.role), hello.rank, hello.token)
        if unfit is not None:
            if self._context is not None:
                self._refusals.note(writer.get_extra_info("peername"), Unverified(unfit))
            writer.write(encode(MessageType.REFUSED, reason=unfit, final=hello.incarnation in self._retired))
            return
        if not hello.session and (objection := self._judge_code(hello)) is not None:
            writer.write(encode(MessageType.WRONG, reason=objection))
            return
        writer.write(encode(MessageType.WELCOME))
        if hello.session:
            self._sessions.add(writer)
            try:
                await self._listen_to_session(hello.rank, reader)
            finally:
                self._sessions.discard(writer)
            return
        peer = self._admit(hello, writer)
        try:
            with self._deciding():
                self.coordinator.joined(peer.member, first, self._clock())
            while line := await reader.readline():
                peer.last_message_at = self._clock()
                message = self._parse(line, str(peer.member))
                if message["type"] != MessageType.BEAT and self._peers.get(peer.member) is peer:
                    with self._deciding():
                        self.coordinator.on_message(peer.member, message, self._clock())
        finally:
            if self._peers.get(peer.member) is peer:
                del self._peers[peer.member]
                log.info("the connection of %s ended", peer.member)
                with self._deciding():
                    self.coordinator.lost(peer.member, self._clock())

    async def _listen_to_session(self, rank: int, reader: asyncio.StreamReader) -> None:
        """Reports of a user's script. The sender is no member: no decision depends on its connection."""
        while line := await reader.readline():
            message = self._parse(line, f"the script of rank {rank}")
            if message["type"] == MessageType.REPORT:
                with self._deciding():
                    self.coordinator.reported(rank, message, self._clock())

    def _parse(self, line: bytes, name: str) -> Message:
        """The message of a line. Raises ValueError for one that the master does not understand."""
        try:
            return incoming.parse(decode(line))
        except ValueError as error:
            log.warning("the master does not understand a message of %s and closes its connection: %s", name, error)
            raise

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """Around each call of the coordinator: what it raises is a failure of the master, not of the peer whose message it handled."""
        try:
            yield
        except Exception as error:
            self._fail(error)
            raise
        finally:
            self.poke()

    def _fail(self, error: Exception) -> None:
        """Ends the master."""
        self._failure = self._failure or error
        self._failed.set()

    def _unfit(self, hello: Hello) -> str | None:
        """Why the master refuses this process; None when it does not."""
        config = self._config
        if hello.role not in list(Role):
            return f"this is the control port of a DistTrain master, which knows no {hello.role}"
        if hello.job != config.uid:
            return f"this is the master of {config.namespace}/{config.name} with uid {config.uid}, not of {hello.job}"
        if hello.attempt != config.attempt:
            return f"this master belongs to attempt {config.attempt}, not to {hello.attempt}"
        if hello.incarnation in self._retired:
            return f"a newer process took the place of {hello.role}-{hello.rank}"
        count = {Role.WORKER: config.world_size, Role.PARAMETER_SERVER: config.parameter_servers}.get(
            Role(hello.role), 0
        )
        if hello.rank >= count and not hello.session:  # the processes of a session are whatever the user starts
            return f"this job has {count} of role {hello.role}: there is no {hello.role}-{hello.rank}"
        return None

    def _judge_code(self, hello: Hello) -> str | None:
        """Why a process cannot train with the code that it has. The others, if they turn out to have the wrong one, get this reason."""
        if self._code.take(hello):
            for peer in self._peers.values():
                if (objection := self._code.objection(str(peer.member), peer.code)) is not None:
                    log.error("%s", objection)
                    self.send(peer.member, MessageType.WRONG, reason=objection)
        objection = self._code.objection(str(Member(Role(hello.role), hello.rank)), hello.code)
        if objection is not None:
            log.error("%s", objection)
        return objection

    def _admit(self, hello: Hello, writer: asyncio.StreamWriter) -> _Peer:
        member, incarnation = Member(Role(hello.role), hello.rank), hello.incarnation
        before = self._newest.get(member)
        if before is not None and before != incarnation:
            self._retired.add(before)
        self._newest[member] = incarnation
        if (restarts := hello.restarts) is not None:
            known = self._restarts.get(restarts.pod)
            if known is None or known.restarts < restarts.restarts:
                self._restarts[restarts.pod] = restarts.value
        old = self._peers.pop(member, None)
        if old is not None:
            old.writer.transport.abort()
            with self._deciding():
                self.coordinator.lost(member, self._clock())
        peer = self._peers[member] = _Peer(member, incarnation, writer, self._clock(), hello.code)
        log.info("%s joined%s", member, "" if before in (None, incarnation) else ", a replacement")
        return peer

    async def _beat(self) -> None:
        interval = beat_interval(self._config.peer_timeout_seconds)
        expected = self._clock() + interval
        while True:
            await asyncio.sleep(interval)
            now = self._clock()
            late, expected = now - expected, now + interval
            with self._deciding():
                self.coordinator.tick(now)
            for peer in list(self._peers.values()):
                if late > interval:
                    peer.last_message_at = now  # the master itself stood still: messages of the others lie unread
                if now - peer.last_message_at > self._config.peer_timeout_seconds:
                    log.warning(
                        "%s was silent for %.1f s; the master closes its connection",
                        peer.member,
                        now - peer.last_message_at,
                    )
                    peer.writer.transport.abort()
                else:
                    self.send(peer.member, MessageType.BEAT, waiting_for=self.coordinator.waiting_for(now))


def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
