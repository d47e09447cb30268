"""The master's control port checks every message: a wrong one costs its sender the connection, and no other peer anything."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.joining import JOIN_KEY, join_token
from disttrain.api.names import Role
from disttrain_trainer.net import incoming
from disttrain_trainer.net.control_server import ControlServer
from disttrain_trainer.net.joining import Judge
from disttrain_trainer.net.messages import Message, MessageType, decode
from disttrain_trainer.net.peers import Member
from disttrain_trainer.net.transport import PLAIN, Transport
from disttrain_trainer.runtime.sockets import listen
from transports import certificate, certified, certified_by
from unit.trainer.configs import command_config

CONFIG = command_config(workers=2)
HELLO: Message = {"type": "hello", "job": "u", "attempt": 1, "role": "worker", "rank": 0, "incarnation": "i"}


class Recorder:
    """A coordinator that keeps what it receives, or runs `do`."""

    ended = released = False

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []
        self.do: Callable[[], None] = lambda: None

    def joined(self, member: Member, hello: Message, now: float) -> None:
        self.said.append(("joined", member.rank))

    def on_message(self, member: Member, message: Message, now: float) -> None:
        self.said.append(("message", message["type"]))
        self.do()

    def reported(self, rank: int, message: Message, now: float) -> None:
        self.said.append(("reported", message["step"]))

    def lost(self, member: Member, now: float) -> None:
        self.said.append(("lost", member.rank))

    def tick(self, now: float) -> None:
        pass

    def terminate(self, now: float) -> None:
        pass

    def waiting_for(self, now: float) -> str | None:
        return None


@asynccontextmanager
async def serving(
    transport: Transport = PLAIN, judge: Judge | None = None
) -> AsyncIterator[tuple[Recorder, int, "asyncio.Task[None]"]]:
    """Its coordinator, its port, and its end."""
    control = ControlServer(config=CONFIG, transport=transport, judge=judge)
    coordinator = control.coordinator = Recorder()
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port = held.getsockname()[1]
        end = asyncio.create_task(control.serve(host="127.0.0.1", port=port))
        await asyncio.sleep(0)  # it listens before it waits for the first time
        yield coordinator, port, end
        end.cancel()
        await asyncio.wait([end])


async def answers(port: int, *lines: bytes, tls: ssl.SSLContext | None = None) -> list[Message]:
    """What a peer that says this receives, until the master closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    writer.writelines(lines)
    received = []
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionResetError, ssl.SSLError):  # it closes what it does not read to the end
            while answer := await reader.readline():
                received.append(decode(answer))
    writer.close()
    return received


def line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param(b"[" * 200_000 + b"\n", id="deeply nested"),
        pytest.param(b'{"a":' * 200_000 + b"\n", id="deeply nested objects"),
        pytest.param(b"7" * 5000 + b"\n", id="a long number"),
        pytest.param(b"x" * (1 << 21), id="a long line"),
        pytest.param(line({"type": "x", "incarnation": []}), id="a list for an incarnation"),
        pytest.param(line({"type": "hello", "role": "worker", "job": "u", "attempt": 1}), id="no rank"),
        pytest.param(line(HELLO | {"rank": -1}), id="a negative rank"),
        pytest.param(line(HELLO | {"rank": 2}), id="a rank beyond the job"),
        pytest.param(line(HELLO | {"role": "master"}), id="a second master"),
        pytest.param(line(HELLO | {"rank": 1e400}), id="an infinite rank"),
        pytest.param(line(HELLO | {"incarnation": "i" * 100}), id="a long incarnation"),
        pytest.param(line(HELLO | {"state": "sleeping"}), id="an unknown state"),
        pytest.param(line(HELLO | {"applied": [[5, 3]]}), id="parts that are none"),
    ],
)
async def test_no_first_line_of_a_stranger_ends_the_master_or_reaches_its_decisions(said: bytes) -> None:
    async with serving() as (coordinator, port, end):
        received = await answers(port, said)
        assert [message["type"] for message in received] in ([], [MessageType.REFUSED])
        assert coordinator.said == []
        assert not end.done()
        await answers(port, line(HELLO), line({"type": "hello"}))
        assert ("joined", 0) in coordinator.said, "the next one is admitted"


@pytest.mark.parametrize(
    "said",
    [
        pytest.param({"type": "nonsense"}, id="no kind of message"),
        pytest.param({"type": "take"}, id="missing fields"),
        pytest.param({"type": "take", "stay": "s", "count": "3", "done": []}, id="a text for a number"),
        pytest.param({"type": "state", "generation": 1, "applied": [[0, 2], [1, 3]]}, id="parts that overlap"),
        pytest.param({"type": "saved", "step": 3, "time": "yesterday"}, id="a time that is none"),
        pytest.param({"type": "nan"}, id="no step"),
        pytest.param({"type": "report", "step": float("inf")}, id="an infinite step"),
        pytest.param({"type": "done", "evaluation": {"accuracy": "high"}}, id="a text for an evaluation"),
        pytest.param({"type": "report", "step": 3, "values": [1.0]}, id="values without names"),
        pytest.param({"type": "report", "step": 3, "final_values": [[7, {"a": [1.0]}]]}, id="a value without a weight"),
    ],
)
async def test_a_member_that_makes_no_sense_is_lost_and_the_master_goes_on(said: Message) -> None:
    async with serving() as (coordinator, port, end):
        received = await answers(port, line(HELLO), line(said))
        assert [message["type"] for message in received] == [MessageType.WELCOME]
        assert coordinator.said == [("joined", 0), ("lost", 0)]
        assert not end.done()


@pytest.mark.parametrize("error", [KeyError("stay"), ValueError("no such thing"), OSError("of a file")])
async def test_a_failure_of_the_coordinator_ends_the_master_whatever_it_is(error: Exception) -> None:
    async with serving() as (coordinator, port, end):

        def fail() -> None:
            raise error

        coordinator.do = fail
        await answers(port, line(HELLO), line({"type": "leaving"}))
        with pytest.raises(type(error)):
            await asyncio.wait_for(asyncio.shield(end), 20)


async def test_a_worker_with_other_code_than_the_first_is_refused_and_joins_nothing() -> None:
    async with serving() as (coordinator, port, _end):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(line(HELLO | {"code": "a" * 64}))
        assert decode(await reader.readline())["type"] == MessageType.WELCOME
        (said,) = await answers(port, line(HELLO | {"rank": 1, "code": "b" * 64}))
        assert said["type"] == MessageType.WRONG
        assert said["reason"].startswith("trainer.code of worker-1 is not that of this attempt (sha256 bbbb")
        assert coordinator.said == [("joined", 0)]
        # A survivor of the master before this one knows better than the first to come.
        await answers(port, line(HELLO | {"rank": 1, "code": "b" * 64, "code_admitted": True}), b"\n")
        message = decode(await reader.readline())
        assert (message["type"], message["reason"][:24]) == (MessageType.WRONG, "trainer.code of worker-0")
        writer.close()


@pytest.mark.parametrize(
    "message",
    [
        {"type": "beat"},
        {"type": "failed", "message": "boom"},
        {"type": "ready", "step": -1},
        {"type": "ready", "samples": 80, "buffers": True},
        {"type": "report", "step": 3, "samples": 64, "loss": 0.5, "epoch": 1, "total_steps": 9},
        {
            "type": "report",
            "step": 3,
            "samples": 64,
            "values": {"f1": [float("nan"), 64]},
            "final_values": [[7, {"f1": [0.5, 1]}], [8.5, {}]],
        },
        {"type": "report", "step": 3.0, "samples": 0, "loss": None, "generation": 2, "total_steps": None},
        {"type": "evaluated", "evaluation": {"perplexity": float("inf"), "count": 3}},
        {"type": "saved", "error": "full", "asked": True},
        {
            "type": "saved",
            "id": "m.1",
            "file": "shard-0-m.1.safetensors",
            "digest": "xxh3_128:" + "0" * 32,
            "applied": [[0, 8]],
        },
        {"type": "state", "id": None, "generation": 0, "applied": [], "max_staleness_seen": 0},
        {"type": "take", "stay": "m.1", "count": 4, "done": [0, 2]},
    ],
)
def test_what_our_processes_say_makes_sense(message: Message) -> None:
    assert incoming.parse(message) is message


def not_taken(kind: MessageType) -> bool:
    try:
        incoming.parse({"type": kind})
    except ValueError as error:
        return "takes no message of type" in str(error)
    return False


def test_every_kind_of_message_to_a_master_has_a_shape() -> None:
    from_the_master = {
        *("welcome", "refused", "released", "finish", "wrong", "world", "reform", "save", "not-joined"),
        *("begin", "drop", "tickets", "evaluate", "hedge", "abandon", "resize", "replicate", "promote", "discard"),
        *("moved", "course", "form", "dissolve"),
    }
    assert {kind for kind in MessageType if not_taken(kind)} == {*from_the_master, MessageType.HELLO}


async def test_a_script_may_report_from_processes_that_the_job_does_not_know() -> None:
    async with serving() as (coordinator, port, _):
        said = [HELLO | {"rank": 7, "session": True}, {"type": "report", "step": 3}, {"type": "nonsense"}]
        await answers(port, *map(line, said))
        assert coordinator.said == [("reported", 3)]


def test_a_pod_is_reached_by_its_addresses_of_either_kind() -> None:
    with listen(None, 0) as listener:
        port = listener.getsockname()[1]
        hosts = ["127.0.0.1", "::1"] if socket.has_dualstack_ipv6() else ["127.0.0.1"]
        for host in hosts:
            socket.create_connection((host, port), timeout=5).close()


def test_what_listens_on_loopback_is_reached_there_alone() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        assert listener.family == socket.AF_INET


def test_a_machine_without_an_address_of_ipv6_is_listened_on_with_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    create = socket.create_server

    def refusing(address: tuple[str, int], *, family: int = socket.AF_INET, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(99, "Cannot assign requested address")
        return create(address, family=family, **options)

    monkeypatch.setattr(socket, "create_server", refusing)
    with listen(None, 0) as listener:
        assert listener.family == socket.AF_INET


def test_who_is_still_connected_when_the_master_ends_is_no_error_in_its_log(caplog: pytest.LogCaptureFixture) -> None:
    async def master() -> None:
        async with serving() as (_, port, _):
            connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            connections[1][1].write(line(HELLO))  # the other one says nothing yet
            assert decode(await connections[1][0].readline())["type"] == MessageType.WELCOME
        for _, writer in connections:
            writer.close()

    asyncio.run(master())
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "under TLS"])
async def test_strangers_that_say_nothing_take_a_bounded_number_of_connections_and_keep_no_member_away(
    tmp_path: Path, tls: bool
) -> None:
    transport = certified(tmp_path) if tls else PLAIN
    async with serving(transport) as (_, port, end):
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(200)]
        member = await asyncio.to_thread(transport.dial, f"127.0.0.1:{port}", timeout=20)
        with contextlib.closing(member):
            member.send(memoryview(line(HELLO)))
            welcome = await asyncio.to_thread(member.receive_some, 1 << 16)
        assert decode(welcome.splitlines()[0])["type"] == MessageType.WELCOME
        oldest, _ = silent[0]
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError):
                assert await oldest.read() == b"", "its connection is closed"
        assert not end.done(), "the master goes on"
        for _, writer in silent:
            writer.close()


async def test_a_peer_without_the_certificate_of_the_attempt_is_named_in_one_line_however_often_it_tries(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    with caplog.at_level("WARNING"):
        async with serving(certified(tmp_path)) as (coordinator, port, _):
            for tls in (stranger, None, stranger, None):
                assert await answers(port, line(HELLO), tls=tls) == []
            member = await asyncio.to_thread(certified_by(tmp_path).dial, f"127.0.0.1:{port}", timeout=20)
            with contextlib.closing(member):
                member.send(memoryview(line(HELLO)))
                welcome = await asyncio.to_thread(member.receive_some, 1 << 16)
            assert decode(welcome.splitlines()[0])["type"] == MessageType.WELCOME
            assert coordinator.said[0] == ("joined", 0)
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition("refuses 127.0.0.1:")[2].partition(": ")[2] for text in said] == [
        "it has no certificate",
        "it does not speak TLS 1.3",
    ]


async def test_master_refuses_and_names_a_process_that_says_it_is_another_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = (certificate(tmp_path) / JOIN_KEY).read_bytes()
    token = join_token(key, Role.WORKER, 1)
    context = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    context.check_hostname = False
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    caplog.set_level("WARNING")

    async def said(**fields: object) -> Message:
        first = (await answers(port, line(HELLO | fields), tls=context))[0]
        return first

    async with serving(certified_by(tmp_path), judge=Judge(key, processes_per_worker=1)) as (coordinator, port, _):
        refused = await said(rank=0, token=token)
        assert (refused["type"], refused["reason"]) == (
            "refused",
            "its join token is not that of worker-0 of this attempt",
        )
        assert (await said(rank=0))["type"] == "refused"
        assert coordinator.said == []
    lines = [record.getMessage() for record in caplog.records]
    assert len([text for text in lines if "the master refuses 127.0.0.1" in text and "of worker-0" in text]) == 1
