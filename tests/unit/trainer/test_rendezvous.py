"""The rendezvous store under TLS answers as torch's TCPStore does, and no wait in it outlives its time, its round or its master."""

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import transports
from disttrain.api.job import Metadata
from disttrain_trainer.net import rendezvous
from disttrain_trainer.net.transport import PLAIN
from disttrain_trainer.parallel.rendezvous_store import RendezvousStore

LONG, SHORT = timedelta(seconds=60), timedelta(milliseconds=50)
Connect = Callable[..., RendezvousStore]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[transports.Rendezvous]:
    found = transports.Rendezvous(transports.certified(tmp_path / "tls"))
    yield found
    found.close()


@pytest.fixture
def connect(server: transports.Rendezvous, tmp_path: Path) -> Iterator[Connect]:
    """Makes clients of the server."""
    made: list[RendezvousStore] = []

    def new(prefix: str = "round-1") -> RendezvousStore:
        transport = transports.certified_by(tmp_path / "tls")
        made.append(RendezvousStore(transport, server.address, prefix=prefix, timeout=LONG))
        return made[-1]

    yield new
    for store in made:
        store.close()


def answers(store: Any) -> list[object]:
    """What a store answers to each kind of question; a KeyError and its like as their kind."""
    found: list[object] = []
    store.set("key", "value")
    found += [store.get("key"), store.check(["key"]), store.check(["key", "other"])]
    found += [store.add("count", 2), store.add("count", -5), store.get("count")]
    found += [store.compare_set("key", "value", "next"), store.compare_set("key", "value", "last"), store.get("key")]
    found += [store.compare_set("new", "", "made"), store.compare_set("absent", "expected", "desired")]
    store.append("key", "+more")
    store.multi_set(["one", "two"], ["1", "2"])
    found += [store.multi_get(["one", "two", "key"]), store.delete_key("one"), store.delete_key("one")]
    found += [store.check(["one"]), store.has_extended_api()]
    store.wait(["two"])
    with pytest.raises(dist.DistStoreError):
        store.wait(["two", "never"], SHORT)
    return found


def test_it_answers_as_torchs_own_does_alone_and_behind_a_prefix(connect: Connect) -> None:
    torchs = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ours, behind = connect("a"), connect("b")
    expected = answers(torchs)
    assert answers(ours) == expected
    assert answers(dist.PrefixStore("prefix", behind)) == answers(dist.PrefixStore("prefix", torchs)) == expected
    assert sorted(ours.list_keys()) == ["count", "key", "new", "two"]


def test_a_value_may_be_any_bytes(connect: Connect) -> None:
    store = connect()
    store.set("bytes", bytes(range(256)))
    assert store.get("bytes") == bytes(range(256))


def waiting(store: RendezvousStore) -> tuple[threading.Thread, list[str]]:
    """A thread that waits for a key, and what ends its wait."""
    found: list[str] = []

    def wait() -> None:
        try:
            found.append(store.get("late").decode())
        except dist.DistNetworkError as error:
            found.append(type(error).__name__)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, found


def test_a_thread_that_waits_holds_up_no_other_one_and_gets_the_key(connect: Connect) -> None:
    store, other = connect(), connect()
    thread, found = waiting(store)
    store.set("early", "1")
    assert thread.is_alive()
    other.set("late", "here")
    thread.join(10)
    assert found == ["here"]


@pytest.mark.parametrize("end", ["the round", "the store"])
def test_a_wait_ends_with_the_round_and_when_the_store_is_closed(
    server: transports.Rendezvous, connect: Connect, end: str
) -> None:
    store = connect()
    store.set("early", "1")
    thread, found = waiting(store)
    if end == "the store":
        store.close()
    while thread.is_alive():
        if end == "the round":
            server.renew()  # again, where the wait had not begun
        thread.join(0.05)
    assert found == ["DistNetworkError"]


def test_a_new_round_finds_no_key_of_the_last_one(server: transports.Rendezvous, connect: Connect) -> None:
    connect().set("key", "old")
    server.renew()
    assert not connect().check(["key"])


def test_a_process_of_another_job_and_one_without_tls_are_refused(
    server: transports.Rendezvous, connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = transports.certified(tmp_path / "other", Metadata(name="job", namespace="other", uid="u"))
    for transport in (stranger, PLAIN):
        with pytest.raises(dist.DistNetworkError):
            RendezvousStore(transport, server.address, prefix="round-1", timeout=LONG).check(["key"])
    connect().set("key", "value")
    assert "the rendezvous store refuses 127.0.0.1" in caplog.text


@pytest.mark.parametrize("message", [b"\x01", b"\x05\x00\x00\x00ab"])
def test_what_is_no_message_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match="not a message"):
        rendezvous.decode(message)
