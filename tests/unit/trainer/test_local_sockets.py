"""Unix sockets beside the ports of loopback: who is found there, and where there is none."""

import contextlib
import socket
from pathlib import Path

import pytest

from disttrain_trainer.net import local_sockets
from disttrain_trainer.net.local_sockets import connect_beside, listen_beside, peer_of
from disttrain_trainer.net.transport import PLAIN, PLAIN_TCP
from disttrain_trainer.runtime.sockets import listen
from transports import certified


@pytest.fixture
def address() -> str:
    """Of a port of loopback at which a process has listened."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def _listener(address: str) -> socket.socket:
    return socket.create_server(("127.0.0.1", int(address.rpartition(":")[2])))


def test_who_dials_a_port_of_loopback_comes_over_the_unix_socket_beside_it(address: str) -> None:
    with _listener(address) as listener, contextlib.ExitStack() as stack:
        beside = listen_beside(listener)
        assert beside is not None
        stack.enter_context(beside)
        dialled = stack.enter_context(contextlib.closing(PLAIN.dial(address, timeout=20)))
        accepted = stack.enter_context(beside.accept()[0])
        assert peer_of(accepted)[0] == "process"
        dialled.send(memoryview(b"hello"))
        assert accepted.recv(9) == b"hello"


def test_a_port_without_one_is_dialled_over_tcp(address: str) -> None:
    with _listener(address) as listener, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(PLAIN.dial(address, timeout=20)))
        assert stack.enter_context(listener.accept()[0]).family == socket.AF_INET


def test_a_process_that_is_gone_is_found_at_neither(address: str) -> None:
    with _listener(address) as listener:
        beside = listen_beside(listener)
        assert beside is not None
        beside.close()
    assert connect_beside(address) is None
    with pytest.raises(OSError, match="refused"):
        PLAIN.dial(address, timeout=20)


def test_a_name_that_another_process_has_leaves_the_port_alone(address: str) -> None:
    with _listener(address) as listener:
        first = listen_beside(listener)
        assert first is not None
        with first:
            assert listen_beside(listener) is None


def test_a_process_of_another_user_is_not_believed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with _listener(address) as listener:
        beside = listen_beside(listener)
        assert beside is not None
        with beside:
            monkeypatch.setattr(local_sockets.os, "getuid", lambda: -2)
            assert connect_beside(address) is None


def test_a_port_of_all_addresses_and_a_name_have_none() -> None:
    with listen(None, 0) as listener:
        assert listen_beside(listener) is None
    assert connect_beside("server-0.job:29600") is None


def test_a_job_with_tls_uses_its_ports(tmp_path: Path) -> None:
    for transport in (certified(tmp_path), PLAIN_TCP):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            assert transport.listen_beside(listener) is None


def test_a_full_queue_is_passed_by(address: str) -> None:
    with _listener(address) as listener, contextlib.ExitStack() as stack:
        beside = listen_beside(listener)
        assert beside is not None
        stack.enter_context(beside).listen(0)
        stack.enter_context(contextlib.closing(PLAIN.dial(address, timeout=20)))
        stack.enter_context(contextlib.closing(PLAIN.dial(address, timeout=20)))
        assert stack.enter_context(listener.accept()[0]).family == socket.AF_INET
