"""A process's end of the control connection: found by connecting, kept alive by beats, re-made when the master is replaced.

One thread connects, reads and sends heartbeats; the role's own thread sends messages and waits for those of the master.
"""

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from disttrain_trainer.errors import PeerLost, Refused, TrainerError, WrongInput
from disttrain_trainer.net import joining, transport
from disttrain_trainer.net.connection import Connection, Silent
from disttrain_trainer.net.messages import MAX_LINE, Message, MessageType, beat_interval, decode, encode
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.process import Process

log = logs.get_logger(__name__)

T = TypeVar("T")

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.05, 1.0
"""Seconds between two attempts to connect."""
QUIET_WAIT_SECONDS = 3.0
"""Seconds that a wait may take without a line in the log: the processes of a job start in any order."""


class ControlClient:
    """The connection to the master.

    describe: the state of the process, sent with every HELLO, so that a new master knows it.
    on_message: called in the connection's thread, with `changed` held; must not block.
    on_released: called after `leave`, when the process may end: everything is saved that could be, or the master is lost, too.
    """

    def __init__(
        self,
        *,
        process: Process,
        describe: Callable[[], Message],
        on_message: Callable[[Message], None],
        on_released: Callable[[], None],
        agent: bool = False,
    ) -> None:
        self.changed = threading.Condition()
        """Held while a message is handled, notified after it."""
        self.failure: TrainerError | None = None
        """Set when this process gives the master up, or the master refuses it."""
        self.finished = False
        """The master sent FINISH: the job is done."""
        self.before_release: Callable[[], None] = lambda: None
        """Called before `on_released`, in any thread: returns when nothing is being written that the end of the process would tear."""
        self._process = process
        self._describe = describe
        self._on_message = on_message
        self._on_released = on_released
        self._agent = agent
        self._address = process.config.addresses.control
        self._reconnect_seconds = process.config.startup_timeout_seconds
        self._peer_timeout = process.config.peer_timeout_seconds
        self._transport = transport.of(process.config, process.tls_dir)
        self._token = joining.token_of(process)
        self._connection: Connection | None = None
        self._interrupt = transport.Interrupt()
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._leaving = False
        self._code_admitted = False
        self._master_state = "the master was not asked yet"
        """The last that is known of the master, for the error of a wait."""
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        """Begins to connect; does not wait for it."""
        self._thread.start()

    def close(self) -> None:
        """Ends the connection, which the master sees at once. Any thread may call this."""
        self._closed.set()
        self._interrupt.end()
        self._drop()

    def send(self, kind: MessageType, **fields: object) -> bool:
        """Sends a message; False when there is no connection now.

        Change the state first, then send: the hello of the next connection tells the state, so that nothing needs to be sent again.
        """
        line = encode(kind, **fields)
        try:
            with self._sending:
                if self._connection is None:
                    return False
                self._connection.send(memoryview(line))
        except OSError:
            self._drop()
            return False
        return True

    def leave(self) -> None:
        """Tells the master that this process received SIGTERM."""
        self._leaving = True
        if not self.send(MessageType.LEAVING):
            self._release()

    def wait(self, ready: Callable[[], T | None], *, what: str, timeout: float | None, logged: bool = False) -> T:
        """Blocks until `ready` returns a result that is not None, and returns it. `ready` is called again after every message.

        Raises PeerLost, which names `what`, after `timeout` seconds, and in any case when the master is declared lost.
        timeout None: the wait may take any time; the plan's deadlines, which know the steps, bound it (docs/design/0001).
        logged: the log says already that this process waits; otherwise a line says so after QUIET_WAIT_SECONDS.
        """
        begin = time.monotonic()
        deadline = begin + (math.inf if timeout is None else timeout)
        result = self._wait_until(min(deadline, begin + QUIET_WAIT_SECONDS), ready)
        if result is None:
            if not logged:
                log.info(
                    "waiting for %s", what
                )  # without holding `changed`: a blocked reader of the log must not block the control thread
            result = self._wait_until(deadline, ready)
        if result is None:
            raise PeerLost(what, f"waited {timeout:g} s; {self._master_state}")
        return result

    def _wait_until(self, deadline: float, ready: Callable[[], T | None]) -> T | None:
        """The result of `ready`, None at the deadline. Raises `failure` when the master is declared lost meanwhile."""
        with self.changed:
            while (result := ready()) is None:
                self.check()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                self.changed.wait(min(remaining, threading.TIMEOUT_MAX))
            return result

    def check(self) -> None:
        """Raises `failure` when the master was declared lost, or refused this process. Does not block; any thread."""
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        lost_at = time.monotonic()
        pause = FIRST_RETRY_SECONDS
        chance = random.Random()  # a generator of its own: user code may have seeded the global one, and draws from it
        logged = ""
        while not self._closed.is_set():
            lost_before = lost_at
            try:
                lost_at = self._converse() or lost_at
                why = "the connection was closed"
            except Refused as refusal:
                self._fail(refusal)
                return
            except (OSError, ValueError) as error:
                why = str(error)
            finally:
                self._drop()
            if self._closed.is_set():
                return
            if self._leaving:
                self._release()
            if lost_at != lost_before:  # the master had admitted this process: the wait begins now
                lost_at, pause = time.monotonic(), FIRST_RETRY_SECONDS
            if time.monotonic() - lost_at > self._reconnect_seconds:
                self._fail(PeerLost(f"master ({self._address})", f"waited {self._reconnect_seconds:g} s for it: {why}"))
                return
            if why != logged and time.monotonic() - lost_at > QUIET_WAIT_SECONDS:
                log.info("waiting for the master at %s: %s", self._address, why)
                logged = why
            self._master_state = f"the master at {self._address}: {why}"
            self._closed.wait(pause * chance.uniform(0.5, 1))
            pause = min(LONGEST_RETRY_SECONDS, pause * 2)

    def _converse(self) -> float | None:
        """One connection from its HELLO to its end. Returns the time of the last message, None when the master did not admit this
        process."""
        beat = beat_interval(self._peer_timeout)
        connection = self._transport.dial(
            self._address, timeout=beat, within=self._peer_timeout, interrupt=self._interrupt
        )
        with contextlib.closing(connection):
            with self._sending:
                # Under one lock with `send`: a change before this is in the HELLO, and a change after it is sent after the HELLO.
                connection.send(memoryview(self._hello()))
                self._connection = connection
            received_at = beaten = time.monotonic()
            admitted = False
            buffer = b""
            while not self._closed.is_set():
                now = time.monotonic()
                if now - beaten >= beat and admitted:
                    beaten = now
                    self.send(MessageType.BEAT)
                try:
                    data = connection.receive_some(65536)
                except Silent:
                    if time.monotonic() - received_at > self._peer_timeout:
                        raise TimeoutError(f"silent for {self._peer_timeout:g} s") from None
                    continue
                if not data:
                    break
                received_at = time.monotonic()
                *lines, buffer = (buffer + data).split(b"\n")
                if len(buffer) > MAX_LINE:
                    raise ValueError("the master sent a line that is too long")
                for line in lines:
                    message = decode(line)
                    if message["type"] == MessageType.WELCOME:
                        admitted = self._code_admitted = True
                        if self._leaving:
                            self.send(MessageType.LEAVING)
                    self._handle(message)
        return received_at if admitted else None

    def _hello(self) -> bytes:
        process = self._process
        with self.changed:
            state = self._describe()
        return encode(
            MessageType.HELLO,
            job=process.config.uid,
            attempt=process.config.attempt,
            role=process.role,
            rank=process.index if self._agent else process.rank,
            incarnation=process.incarnation,
            agent=self._agent,
            token=self._token,
            code=process.code_digest,
            code_admitted=self._code_admitted,
            **({"restarts": process.restarts.model_dump(mode="json")} if process.restarts else {}),
            **state,
        )

    def _handle(self, message: Message) -> None:
        match message["type"]:
            case MessageType.BEAT:
                waiting = message.get("waiting_for")
                self._master_state = f"the master waits for {waiting}" if waiting else "the master waits for no process"
                return
            case MessageType.REFUSED if message.get("final"):
                raise Refused(f"master ({self._address})", str(message.get("reason")))
            case MessageType.REFUSED:
                raise ConnectionError(str(message.get("reason")))
        with self.changed:
            match message["type"]:
                case MessageType.FINISH:
                    self.finished = True
                    self._on_message(message)
                case MessageType.RELEASED:
                    self._release()
                case MessageType.WRONG:
                    self.failure = WrongInput(str(message["reason"]))
                case _:
                    self._on_message(message)
            self.changed.notify_all()

    def _release(self) -> None:
        self.before_release()
        self._on_released()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def _fail(self, failure: TrainerError) -> None:
        with self.changed:
            self.failure = failure
            self.changed.notify_all()
