"""The transport under TLS: who is let in and who is not, in words; and what its connections promise beside that."""

import contextlib
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from disttrain.api.job import Metadata
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.net import transport
from disttrain_trainer.net.transport import PLAIN, Closed, Connection, Transport, Unverified
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


@pytest.mark.parametrize("kind", ["plain", "TLS"])
def test_who_is_told_to_read_no_more_may_say_a_last_word(tmp_path: Path, kind: str) -> None:
    with connected(PLAIN if kind == "plain" else certified(tmp_path)) as (a, b), ThreadPoolExecutor() as threads:
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
