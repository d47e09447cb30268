"""Collectives over connections of ours: ranks of one process, each with sockets of its own. What they compute for torch is in
tests/training/test_process_group.py."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import transports
from disttrain.api.job import Metadata
from disttrain_trainer.net.transport import PLAIN, Transport
from disttrain_trainer.parallel.backend import BrokenGroup, RoundEnd
from disttrain_trainer.parallel.traffic import Traffic
from disttrain_trainer.parallel.wire_backend import WireBackend

LONG = timedelta(seconds=30)
LARGE = 400_001
SUM, PLANTED = dist.AllreduceOptions(), b"a planted tensor"


class Ranks:
    """Backends of one group, and the end of their round."""

    def __init__(self, transports: list[Transport]) -> None:
        self.ends = [RoundEnd() for _ in transports]
        self.backends = [
            WireBackend(
                rank=rank,
                size=len(transports),
                transport=transport,
                host="127.0.0.1",
                timeout=LONG,
                round_end=self.ends[rank],
                traffic=Traffic(),
            )
            for rank, transport in enumerate(transports)
        ]

    def connect(self, via: Callable[[str], str] = lambda place: place) -> None:
        """via: where a rank's peers find it instead."""
        places = [via(backend.place) for backend in self.backends]
        with ThreadPoolExecutor() as threads:
            for done in [threads.submit(backend.connect, places) for backend in self.backends]:
                done.result()

    def end(self, rank: int) -> None:
        """The round ends for one rank, as the control thread ends it."""
        self.ends[rank].reach()
        self.backends[rank].close()


@contextlib.contextmanager
def ranks_of(transports: list[Transport]) -> Iterator[Ranks]:
    ranks = Ranks(transports)
    try:
        yield ranks
    finally:
        for rank in range(len(ranks.backends)):
            ranks.end(rank)
        for backend in ranks.backends:
            backend.release()


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Ranks]:
    with ranks_of([transports.certified(tmp_path)] * 3) as ranks:
        ranks.connect()
        yield ranks


def summed(ranks: Ranks, vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    works = [backend.allreduce([vector], SUM) for backend, vector in zip(ranks.backends, vectors, strict=True)]
    for work in works:
        work.wait()
    return vectors


@pytest.mark.parametrize("count", [5, LARGE], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_is_made_in_the_order_of_the_ranks_and_has_the_same_bits_on_each(
    three: Ranks, count: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(count, generator=generator).to(dtype) for _ in range(3)]
    expected = (vectors[0] + vectors[1]) + vectors[2]
    for found in summed(three, vectors):
        assert torch.equal(found, expected)


def test_operations_that_were_started_together_end_in_their_order_and_mix_nothing(three: Ranks) -> None:
    sizes = [1, 300_000, 7, 0, 50_000] * 4
    vectors = [[torch.full((size,), float(rank + number)) for number, size in enumerate(sizes)] for rank in range(3)]
    works = [
        backend.allreduce([vector], SUM) for backend, own in zip(three.backends, vectors, strict=True) for vector in own
    ]
    for work in works:
        work.wait()
    for own in vectors:
        assert all(torch.equal(vector, torch.full_like(vector, 3.0 + 3 * number)) for number, vector in enumerate(own))


def test_ranks_that_call_different_operations_are_told_which(three: Ranks) -> None:
    three.backends[1].barrier(dist.BarrierOptions())
    work = three.backends[0].allreduce([torch.zeros(4)], SUM)
    with pytest.raises(
        BrokenGroup, match=r"rank 1 is at collective 1, barrier, with 0 bytes, where rank 0 is at 1, allreduce, with 16"
    ):
        work.wait()


@pytest.mark.parametrize("count", [5, 8_000_000], ids=["few", "many"])
def test_a_wait_ends_when_a_peer_is_lost_and_the_peer_is_named(three: Ranks, count: int) -> None:
    works = [three.backends[rank].allreduce([torch.zeros(count)], SUM) for rank in (0, 1)]
    three.backends[2].close()
    for work in works:
        with pytest.raises(BrokenGroup, match="rank 2 is lost"):
            work.wait()


@pytest.mark.parametrize("count", [5, 8_000_000], ids=["few", "half sent"])
def test_a_wait_for_a_frozen_peer_ends_with_the_round(three: Ranks, count: int) -> None:
    works = [
        three.backends[0].allreduce([torch.zeros(count)], SUM),
        three.backends[0].send([torch.zeros(count)], 1, 0),
        three.backends[0].recv([torch.zeros(count)], 1, 0),
    ]
    threading.Timer(0.05, three.end, [0]).start()
    for work in (works[0], works[2]):
        with pytest.raises(BrokenGroup, match="it ended within a step"):
            work.wait()
    with pytest.raises(BrokenGroup):
        three.backends[0].allreduce([torch.zeros(1)], SUM)


def test_a_wait_with_a_limit_ends_then_and_the_operation_goes_on(three: Ranks) -> None:
    vectors = [torch.ones(3) for _ in range(3)]
    first = three.backends[0].allreduce([vectors[0]], SUM)
    with pytest.raises(RuntimeError, match=r"longer than 0\.05 s"):
        first.wait(timedelta(milliseconds=50))
    for rank in (1, 2):
        three.backends[rank].allreduce([vectors[rank]], SUM)
    first.wait()
    assert vectors[0].tolist() == [3, 3, 3]


def test_messages_come_by_their_tag_and_else_in_their_order(three: Ranks) -> None:
    sender, receiver, _ = three.backends
    for tag, value in ((7, 1.0), (8, 2.0), (7, 3.0)):
        sender.send([torch.full((LARGE,), value)], 1, tag).wait()
    found = [torch.zeros(LARGE) for _ in range(3)]
    for vector, tag in zip(found, (8, 7, 7), strict=True):
        receiver.recv([vector], 0, tag).wait()
    assert [vector[-1].item() for vector in found] == [2.0, 1.0, 3.0]


def test_a_message_of_another_size_is_an_error_of_its_receiver(three: Ranks) -> None:
    work = three.backends[1].recv([torch.zeros(4)], 0, 0)
    three.backends[0].send([torch.zeros(3)], 1, 0)
    with pytest.raises(BrokenGroup, match="a message of 12 bytes came for a tensor of 16"):
        work.wait()


def test_a_peer_of_another_job_finds_no_way_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = transports.certified(tmp_path / "ours")
    theirs = transports.certified(tmp_path / "theirs", Metadata(name="job", namespace="other", uid="u"))
    with (
        ranks_of([ours, theirs]) as ranks,
        pytest.raises(BrokenGroup, match="its certificate is not that of this attempt"),
    ):
        ranks.connect()
    assert "refuses 127.0.0.1" in caplog.text


def test_a_refused_connection_keeps_no_file_number_of_the_rank(three: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    address = three.backends[0].place.split()[0].split(":")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        with socket.create_connection((address[0], int(address[1]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 4)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(1 << 16):
                    pass
    deadline = time.monotonic() + 20
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert caplog.text.count("refuses 127.0.0.1") == 1, "each peer is named once"
    assert [vector.tolist() for vector in summed(three, [torch.ones(2) for _ in range(3)])] == [[3.0, 3.0]] * 3


def test_a_connection_that_has_carried_enough_of_one_key_is_followed_by_another(tmp_path: Path) -> None:
    relays = Relays()
    with (
        contextlib.closing(relays),
        ranks_of([transports.certified(tmp_path, records=10)] * 3) as ranks,
    ):
        ranks.connect(relays.via)
        for number in range(12):
            for count in (5, LARGE):
                for found in summed(ranks, [torch.full((count,), float(rank + number)) for rank in range(3)]):
                    assert torch.equal(found, torch.full((count,), 3.0 + 3 * number))
        sent = [ranks.backends[0].send([torch.full((3,), float(number))], 1, 0) for number in range(40)]
        received = [torch.zeros(3) for _ in sent]
        for vector in received:
            ranks.backends[1].recv([vector], 0, 0).wait()
        assert [vector[0].item() for vector in received] == list(range(40))
    assert relays.connections > 6 * 12


class Relays:
    """Lets every connection pass, and keeps what went through."""

    def __init__(self) -> None:
        self.connections = 0
        self.seen: list[bytes] = []
        self._sockets: list[socket.socket] = []

    def via(self, place: str) -> str:
        address, token = place.split()
        host, port = address.rsplit(":", 1)
        listener = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(listener)
        threading.Thread(target=self._accept, args=(listener, (host, int(port)))).start()
        return f"127.0.0.1:{listener.getsockname()[1]} {token}"

    def close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self, listener: socket.socket, target: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):
            while True:
                one, other = listener.accept()[0], socket.create_connection(target)
                self.connections += 1
                self._sockets += [one, other]
                for ends in ((one, other), (other, one)):
                    threading.Thread(target=self._pass, args=ends).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 20):
                self.seen.append(data)
                other.sendall(data)
            other.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_who_listens_reads_a_planted_tensor_only_without_tls(tmp_path: Path, tls: bool) -> None:
    planted = torch.frombuffer(bytearray(PLANTED * 40_000), dtype=torch.uint8)
    relays = Relays()
    with (
        contextlib.closing(relays),
        ranks_of([transports.certified(tmp_path) if tls else PLAIN] * 3) as ranks,
    ):
        ranks.connect(relays.via)
        received = torch.zeros_like(planted)
        ranks.backends[1].recv([received], 0, 0)
        ranks.backends[0].send([planted], 1, 0).wait()
        vectors = [planted.clone(), *(torch.zeros_like(planted) for _ in range(2))]
        assert all(torch.equal(found, planted) for found in summed(ranks, vectors))
    assert sum(map(len, relays.seen)) > 3 * len(planted)
    assert any(PLANTED in data for data in relays.seen) is not tls
