"""The binary protocol: what is encoded comes back, and nothing else is believed."""

import struct
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain_trainer.net.connection import CHUNK, Closed, Connection, Silent
from disttrain_trainer.net.frames import SIZE, Header, Link, Op, ProtocolError
from disttrain_trainer.net.transport import PLAIN, PLAIN_TCP, Transport
from disttrain_trainer.parameter_server.identity import Hello
from transports import certified, connected

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
headers = st.builds(
    Header,
    op=st.sampled_from(Op),
    code=st.integers(0, 2**16 - 1),
    samples=u32,
    batch_samples=u32,
    index=u64,
    step=st.integers(-1, 2**63 - 1),
    clock=u64,
    version=u64,
    nbytes=u64,
)


@given(headers)
def test_a_header_survives_the_wire(header: Header) -> None:
    assert Header.decode(header.encode()) == header
    assert len(header.encode()) == SIZE


@given(headers, st.integers(0, SIZE - 1), st.integers(1, 255))
def test_a_header_with_a_wrong_byte_anywhere_is_refused(header: Header, at: int, flip: int) -> None:
    data = bytearray(header.encode())
    data[at] ^= flip
    with pytest.raises(ProtocolError):
        Header.decode(data)


@given(st.binary(max_size=2 * SIZE))
def test_garbage_is_no_header(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Header.decode(data)


def test_an_unknown_op_or_another_version_of_the_protocol_is_named() -> None:
    def forged(at: int, value: int) -> bytes:
        data = bytearray(Header(op=Op.PULL).encode())
        data[at] = value
        data[-4:] = struct.pack("<I", zlib.crc32(data[:-4]))
        return bytes(data)

    with pytest.raises(ProtocolError, match="there is no op 99"):
        Header.decode(forged(5, 99))
    with pytest.raises(ProtocolError, match="speaks version 9"):
        Header.decode(forged(4, 9))


@given(st.one_of(st.binary(max_size=200), st.text(max_size=50).map(str.encode), st.just(b'{"rank": 1}')))
def test_garbage_is_no_hello(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="HELLO is malformed"):
        Hello.decode(data)


@pytest.fixture(params=["unix", "TCP", "TLS"])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Transport:
    plain = {"unix": PLAIN, "TCP": PLAIN_TCP}
    return plain.get(request.param) or certified(tmp_path)


@pytest.fixture
def timeout() -> float:
    """Seconds. No end is silent within a message, but for tests that ask for a short time-out."""
    return 20


@pytest.fixture
def connections(transport: Transport, timeout: float) -> Iterator[tuple[Connection, Connection]]:
    with connected(transport, timeout=timeout) as pair:
        yield pair


@pytest.fixture
def pair(connections: tuple[Connection, Connection]) -> tuple[Link, Link]:
    """Two ends of a connection."""
    a, b = connections
    return Link(a), Link(b)


def test_payload_goes_from_memory_into_memory_and_is_counted(pair: tuple[Link, Link]) -> None:
    a, b = pair
    sent = [memoryview(bytes(range(256)) * (CHUNK // 200)), memoryview(b""), memoryview(b"end")]
    received = [memoryview(bytearray(len(view))) for view in sent]
    header = Header(op=Op.VALUES, version=7, nbytes=sum(len(view) for view in sent))
    thread = threading.Thread(target=a.send, args=(header, sent))
    thread.start()
    got = b.receive()
    b.receive_into(got, received)
    thread.join()
    assert got == header
    assert received == sent
    assert a.sent == b.received == SIZE + header.nbytes


def test_a_payload_of_another_size_than_the_shards_is_refused_before_it_is_read(pair: tuple[Link, Link]) -> None:
    a, b = pair
    a.send(Header(op=Op.PUSH, nbytes=4), [memoryview(b"1234")])
    with pytest.raises(ProtocolError, match="PUSH has 4 bytes of payload, not the 8 of this shard"):
        b.receive_into(b.receive(), [memoryview(bytearray(8))])


def test_a_long_text_is_refused_before_it_is_read(pair: tuple[Link, Link]) -> None:
    _, b = pair
    with pytest.raises(ProtocolError, match="more than 65536"):
        b.receive_text(Header(op=Op.HELLO, nbytes=1 << 62))


@pytest.mark.parametrize("timeout", [0.2])
def test_a_silent_peer_is_noticed_when_it_stops_sending_and_when_it_stops_taking(pair: tuple[Link, Link]) -> None:
    a, b = pair
    begin = time.monotonic()
    with pytest.raises(Silent):
        a.receive()
    data = memoryview(bytes(64 << 20))
    with pytest.raises(Silent):
        b.send(Header(op=Op.VALUES, nbytes=len(data)), [data])
    assert 0.4 <= time.monotonic() - begin < 30


def test_a_peer_that_closes_or_is_aborted_by_another_thread_is_noticed_at_once(pair: tuple[Link, Link]) -> None:
    a, b = pair
    threading.Timer(0.05, b.abort).start()
    with pytest.raises(Closed):
        b.receive(patient=True)
    with pytest.raises(Closed, match="closed by the peer"):
        a.receive(patient=True)


@pytest.mark.parametrize("timeout", [0.2])
def test_a_worker_that_computes_may_be_silent_between_requests_but_not_within_one(
    pair: tuple[Link, Link], connections: tuple[Connection, Connection]
) -> None:
    a, b = pair
    header = Header(op=Op.PULL)
    threading.Timer(0.5, a.send, (header,)).start()
    assert b.receive(patient=True) == header
    connections[0].send(memoryview(replace(header, clock=5).encode())[:10])
    with pytest.raises(Silent):
        b.receive(patient=True)
