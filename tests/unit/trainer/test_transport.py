"""The transport under TLS: who is let in and who is not, in words; and what its connections promise beside that."""

import contextlib
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from disttrain.api.job import Metadata
from disttrain_trainer.errors import PeerLost, WrongInput
from disttrain_trainer.net import transport
from disttrain_trainer.net.connection import Closed, Connection, Ended, Silent, Unverified
from disttrain_trainer.net.transport import PLAIN, PLAIN_TCP, Interrupt, Transport
from disttrain_trainer.runtime.sockets import own_port
from transports import JOB, certificate, certified, connected, mutual_config

ANOTHER = Metadata(name="another", namespace="default", uid="5f0c1a52-11f5-4d5e-a4e3-3d7f7b7e0c11")
MANY = 8 << 20


def _intruder(folder: Path | None) -> ssl.SSLContext:
    """A TLS client that believes any server. folder: of a certificate that it shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if folder is not None:
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return context


def _answer_to(intruder: ssl.SSLContext | None, ours: Transport) -> str:
    """What the end that accepts says of a client. None: one that speaks no TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        accepted = ours.accept(listener.accept()[0], timeout=20)
        with ThreadPoolExecutor() as threads, contextlib.closing(accepted):
            verified = threads.submit(accepted.handshake, within=20)
            with contextlib.suppress(OSError):
                if intruder is None:
                    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                else:
                    intruder.wrap_socket(sock).close()
            error = verified.exception()
    assert isinstance(error, Unverified)
    return str(error)


@pytest.mark.parametrize(
    ("job", "attempt"), [(ANOTHER, 1), (JOB, 1)], ids=["of another job", "of an older attempt, or a forger's"]
)
def test_a_peer_with_another_authoritys_certificate_is_refused(tmp_path: Path, job: Metadata, attempt: int) -> None:
    theirs = _intruder(certificate(tmp_path / "theirs", job, attempt=attempt))
    said = _answer_to(theirs, certified(tmp_path / "ours", attempt=2))
    assert said.startswith("its certificate is not that of this attempt of the job (")


def test_a_peer_without_a_certificate_or_without_tls_is_refused(tmp_path: Path) -> None:
    ours = certified(tmp_path)
    assert _answer_to(_intruder(None), ours) == "it has no certificate"
    assert _answer_to(None, ours) == "it does not speak TLS 1.3"


def test_an_older_tls_is_refused(tmp_path: Path) -> None:
    old = _intruder(certificate(tmp_path))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert _answer_to(old, transport.of(mutual_config(), tmp_path)) == "it does not speak TLS 1.3"


def test_an_expired_certificate_is_refused_at_both_ends(tmp_path: Path) -> None:
    old = certified(tmp_path, age=timedelta(hours=3))
    assert _answer_to(_intruder(tmp_path), old) == "its certificate has expired"
    assert _objection(old, old) == "its certificate has expired"


def _objection(ours: Transport, theirs: Transport) -> str:
    """What the end that dials says of the other one."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as threads:
        dialled = threads.submit(ours.dial, f"127.0.0.1:{listener.getsockname()[1]}", timeout=20)
        with contextlib.closing(theirs.accept(listener.accept()[0], timeout=20)) as accepted:
            with contextlib.suppress(Closed):
                accepted.handshake(within=20)
            with pytest.raises(Unverified) as error:
                dialled.result()
    return str(error.value)


def test_a_dialer_verifies_the_attempt_and_the_name_of_its_job_at_any_address(tmp_path: Path) -> None:
    ours = certified(tmp_path / "ours")
    assert "not that of this attempt" in _objection(ours, certified(tmp_path / "theirs"))
    of_another_name = transport.of(mutual_config(ANOTHER), tmp_path / "ours")
    assert "Hostname mismatch" in _objection(of_another_name, ours)


def test_a_dialer_that_is_refused_after_its_handshake_reads_why(tmp_path: Path) -> None:
    ours = certified(tmp_path)
    bare = _intruder(None)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as threads:
        accepting = threads.submit(lambda: ours.accept(listener.accept()[0], timeout=20))
        with bare.wrap_socket(
            socket.create_connection(listener.getsockname()), do_handshake_on_connect=False
        ) as client:
            accepted = accepting.result()
            refused = threads.submit(accepted.handshake, within=20)
            client.do_handshake()  # under TLS 1.3 it is over for the client before the other end has seen its certificate
            with pytest.raises(ssl.SSLError, match=r"(?i)alert certificate required"):
                client.recv(1)
            assert isinstance(refused.exception(), Unverified)
            accepted.close()


def test_one_thread_may_read_while_another_writes_at_both_ends(tmp_path: Path) -> None:
    data = memoryview(bytes(range(256)) * (MANY // 256))

    def read(connection: Connection) -> bytes:
        into = bytearray(MANY)
        connection.receive_into(memoryview(into))
        return bytes(into)

    with connected(certified(tmp_path)) as ends, ThreadPoolExecutor(4) as threads:
        written = [threads.submit(end.send, data) for end in ends]
        for received in [threads.submit(read, end) for end in ends]:
            assert received.result() == data
        for sent in written:
            sent.result()


@pytest.fixture(params=["unix", "tcp", "tls"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Transport:
    plain = {"unix": PLAIN, "tcp": PLAIN_TCP}
    return plain.get(request.param) or certified(tmp_path)


def test_who_is_told_to_read_no_more_may_say_a_last_word(either: Transport) -> None:
    with connected(either) as (a, b), ThreadPoolExecutor() as threads:
        reading = threads.submit(a.receive_some, 9)
        a.stop_reading()
        assert isinstance(reading.exception(), Closed) or reading.result() == b""
        a.send(memoryview(b"goodbye"))
        assert b.receive_some(9) == b"goodbye"


def test_what_is_sent_after_an_abort_is_not_sent_in_plain(tmp_path: Path) -> None:
    with connected(certified(tmp_path)) as (a, b):
        a.abort()
        with pytest.raises(Closed):
            a.send(memoryview(b"a secret"))
        assert b.receive_some(100) == b""


def test_a_process_without_its_certificate_says_so(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="was given no certificate"):
        transport.of(mutual_config(), None)
    with pytest.raises(WrongInput, match=f"{tmp_path}: the certificate of the attempt cannot be read: No such file"):
        transport.of(mutual_config(), tmp_path)


@pytest.mark.parametrize("work", ["send", "receive"])
def test_a_thread_that_sends_or_receives_is_ended_by_a_close_and_waited_for(either: Transport, work: str) -> None:
    """Its file number is another file's at once."""
    endless = memoryview(bytearray(64 << 20))

    def use(connection: Connection) -> None:
        started.set()
        while True:
            connection.send(endless) if work == "send" else connection.receive_into(endless, patient=True)

    for _ in range(5):
        started = threading.Event()
        with connected(either) as (ours, _), ThreadPoolExecutor() as threads:
            used = threads.submit(use, ours)
            assert started.wait(20)
            ours.close()
            assert isinstance(used.exception(timeout=20), Closed)
            with pytest.raises(Closed):
                ours.send(memoryview(b"late"))
            ours.abort()
            ours.close()


def test_a_dial_that_waits_for_its_peer_is_ended_by_another_thread(either: Transport) -> None:
    """The peer accepts nothing: the connection stands, for the kernel, or waits for a place in the queue."""
    interrupt = Interrupt()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ThreadPoolExecutor() as threads:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        waiting = []
        for _ in range(4):  # two places of the queue are taken by the first
            waiting.append(threads.submit(either.dial, address, timeout=600, interrupt=interrupt))
        interrupt.end()
        for dial in waiting:
            if (error := dial.exception(timeout=20)) is not None:
                assert isinstance(error, Closed)
            else:
                dial.result().close()
    with pytest.raises(Closed, match="this side closed"):
        either.dial("127.0.0.1:9", timeout=600, interrupt=interrupt)


def test_a_silent_peer_is_noticed_by_who_sends_and_by_who_receives(either: Transport) -> None:
    much = memoryview(bytearray(64 << 20))
    with connected(either, timeout=0.5) as (ours, _), pytest.raises(Silent):
        ours.send(much)
    with connected(either, timeout=0.5) as (ours, _), pytest.raises(Silent):
        ours.receive_into(much)


def test_both_ends_go_on_with_other_keys_and_verify_one_another_again(tmp_path: Path) -> None:
    with connected(certified(tmp_path, records=4)) as (ours, theirs), ThreadPoolExecutor() as threads:
        for number in range(3):
            assert not ours.spent
            assert not theirs.spent
            data = memoryview(bytes([number]) * (5 << 14))
            found = memoryview(bytearray(len(data)))
            sent = threads.submit(ours.send, data)
            theirs.receive_into(found)
            sent.result()
            assert found == data
            assert ours.spent
            assert theirs.spent
            renewed = threads.submit(ours.renew, within=20)
            theirs.renew(within=20)
            renewed.result()


def test_a_silent_peer_is_noticed_after_the_keys_changed_too(tmp_path: Path) -> None:
    with connected(certified(tmp_path), timeout=0.5) as (ours, theirs), ThreadPoolExecutor() as threads:
        renewed = threads.submit(ours.renew, within=20)
        theirs.renew(within=20)
        renewed.result()
        with pytest.raises(Silent):
            ours.receive_into(memoryview(bytearray(1)))
        waiting = threads.submit(theirs.receive_into, memoryview(bytearray(1)), patient=True)
        theirs.stop_reading()
        assert isinstance(waiting.exception(timeout=20), (Closed, Ended))


def test_an_end_that_is_lost_while_the_keys_change_is_noticed(tmp_path: Path) -> None:
    ours = certified(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as threads:
        dialled = threads.submit(ours.dial, f"127.0.0.1:{listener.getsockname()[1]}", timeout=20)
        accepted = ours.accept(listener.accept()[0], timeout=20)
        with contextlib.closing(accepted):
            accepted.handshake(within=20)
            with contextlib.closing(dialled.result()) as connection:
                renewed = threads.submit(connection.renew, within=20)
                accepted.close()
                assert isinstance(renewed.exception(timeout=20), Closed)


def test_plain_connections_have_no_keys(tmp_path: Path) -> None:
    with connected(PLAIN) as (ours, theirs):
        ours.renew(within=20)
        ours.send(memoryview(b"x"))
        found = bytearray(1)
        theirs.receive_into(memoryview(found))
        assert (bytes(found), ours.spent) == (b"x", False)


def test_a_port_that_another_process_has_is_one_line_with_the_port_and_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PeerLost) as lost:
            own_port("the copies of the data", "127.0.0.1", port)
    assert str(lost.value) == (
        f"port {port}: the copies of the data cannot listen: Address already in use; another process of this pod or machine has the "
        "port: give that another one"
    )
