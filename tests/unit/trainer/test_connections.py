"""Clients of a port take no more than a bounded number of the process's files, and none for ever."""

import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from cluster.processes import wait_for
from disttrain.api.names import Role
from disttrain_trainer.runtime import exposition, machine, sockets
from disttrain_trainer.runtime.exposition import MOST_CLIENTS, serve
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import Newcomers
from unit.trainer.configs import command_config


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture
def port() -> int:
    """That of a master's metrics."""
    port = free_port()
    process = Process(config=command_config(), role=Role.MASTER, index=0)
    serve(Metrics(process), host="127.0.0.1", port=port, progress=lambda _: '{"step": 3}')
    return port


@contextmanager
def idle(port: int, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(count)]


def ask(port: int, method: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_idle_connections_to_the_metrics_port_take_a_bounded_number_of_files_and_keep_no_scrape_away(port: int) -> None:
    before = open_files()
    with idle(port, 300):
        assert ask(port, "GET", "/progress") == (200, b'{"step": 3}')
        wait_for("the surplus to be closed", lambda: open_files() - before - 300 <= MOST_CLIENTS + 2, 20)


def test_a_request_that_does_not_end_is_ended(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then would keep any time-out between two bytes from passing."""
    monkeypatch.setattr(exposition, "REQUEST_SECONDS", 0.5)
    with idle(port, 1) as (slow,):
        begin = time.monotonic()
        with suppress(OSError):  # a broken pipe, or a reset
            while time.monotonic() - begin < 10:
                slow.sendall(b"G")
                time.sleep(0.1)
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/metrics", 200),
        ("HEAD", "/progress", 200),
        ("GET", "/nothing", 404),
        ("HEAD", "/nothing", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/progress", 405),
        ("OPTIONS", "/", 405),
    ],
)
def test_the_metrics_port_answers_as_http_has_it(port: int, method: str, path: str, status: int) -> None:
    answered, body = ask(port, method, path)
    assert answered == status
    assert method != "HEAD" or body == b""


def test_of_too_many_connections_that_say_nothing_the_oldest_are_closed() -> None:
    closed: list[int] = []
    newcomers: Newcomers[int] = Newcomers(2, closed.append)
    for number in range(5):
        newcomers.add(number)
    newcomers.discard(3)
    newcomers.add(5)
    assert closed == [0, 1, 2]


def test_a_connection_to_the_store_that_says_nothing_takes_no_file() -> None:
    with sockets.listen("127.0.0.1", 0) as listener:
        sockets.defer_silent(listener)
        listener.settimeout(0.5)
        with idle(listener.getsockname()[1], 3) as (_, _, speaks):
            with pytest.raises(TimeoutError):
                listener.accept()
            speaks.sendall(b"hello")
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(5) == b"hello"


def test_a_process_raises_its_soft_limit_of_open_files() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        machine.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(machine.MOST_FILES, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_threads_end_with_the_connections(port: int) -> None:
    with idle(port, 5):
        pass
    wait_for("the threads to end", lambda: not [t for t in threading.enumerate() if "process_request" in t.name], 10)
