"""Copies of packed data on the workers' disks: who keeps what, who serves whom, and that no copy is believed unseen."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import wait_for
from configs import config_of
from disttrain.api.names import Role
from disttrain.api.runtime import Addresses
from disttrain_trainer.data.copy_folder import CopyFolder
from disttrain_trainer.data.pack_index import file_name
from disttrain_trainer.data.pack_writer import write
from disttrain_trainer.data.packed_dataset import PackedDataset
from disttrain_trainer.data.placement import holders
from disttrain_trainer.data.store import Folder
from disttrain_trainer.errors import PeerLost, WrongInput
from disttrain_trainer.net import copies as copies_module
from disttrain_trainer.net.copies import WorkerCopies
from disttrain_trainer.net.copy_peers import Peer, hello_of
from disttrain_trainer.net.transport import PLAIN, Transport
from disttrain_trainer.runtime.process import Process
from transports import certified

KEY = bytes(range(32))
PLANTED = b"a planted sample that must stay secret"
PARTITIONS = 6
WORKERS = 3


def test_each_partition_has_its_workers_and_all_workers_have_much_the_same() -> None:
    kept = Counter(worker for p in range(3000) for worker in holders(KEY[:16], p, workers=10, copies=3))
    assert sum(kept.values()) == 9000
    assert all(len(set(holders(KEY[:16], p, workers=10, copies=3))) == 3 for p in range(100))
    assert set(kept) == set(range(10))
    assert all(800 < count < 1000 for count in kept.values())
    assert holders(KEY[:16], 5, workers=2, copies=4) in ([0, 1], [1, 0]), "no more than there are"


def test_another_worker_moves_only_the_copies_that_it_keeps() -> None:
    for partition in range(200):
        before = holders(KEY[:16], partition, workers=8, copies=2)
        after = holders(KEY[:16], partition, workers=9, copies=2)
        assert after == before or (8 in after and set(after) - {8} < set(before))


class Workers:
    """Workers of one job, each with a disk of its own."""

    def __init__(self, root: Path, stack: ExitStack, transport: Transport) -> None:
        self.root, self._stack, self._transport = root, stack, transport
        folder = root / "data" / "train"
        self._id = b""
        while not 0 < len(self.kept(0)) < PARTITIONS:  # which copies a worker keeps is drawn with each packing
            shutil.rmtree(folder, ignore_errors=True)
            self.index = write(_Planted(), folder, split="train", partitions=PARTITIONS, key=KEY, what="mine:dataset")
            self._id = self.index.id
        held = [stack.enter_context(socket.socket()) for _ in range(WORKERS)]
        for one in held:
            one.bind(("127.0.0.1", 0))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        addresses = tuple(f"127.0.0.1:{one.getsockname()[1]}" for one in held)
        trainer = {
            "model": "m:m",
            "dataset": "disttrain_trainer.data:packed",
            "optimizer": {"name": "SGD", "learningRate": 1},
            "epochs": 1,
        }
        spec: dict[str, Any] = {
            "strategy": {"type": "DataParallel"},
            "trainer": trainer,
            "worker": {"replicas": WORKERS},
            "data": {"replication": 2, "volume": {"persistentVolumeClaim": "c"}},
        }
        self.config = config_of(spec, addresses=Addresses(control="h:1", rendezvous="h:2", copies=addresses))

    def disk(self, index: int) -> Path:
        return self.root / f"worker-{index}"

    def start(self, index: int, *, limit: int | None = None, **changes: Any) -> PackedDataset:
        """A worker with its copies, which it makes in the background. limit: of its disk, in bytes."""
        config = self.config.model_copy(update=changes)
        process = Process(config=config, role=Role.WORKER, index=index, copies_dir=self.disk(index), copies_limit=limit)
        copies = WorkerCopies(process, self._transport)
        dataset = PackedDataset(
            self.root / "data" / "train", KEY, cache=1, copies=copies
        )  # every other read is one of a file
        copies.keep()
        self._stack.callback(copies.close)
        return dataset

    @contextmanager
    def alone(self, index: int) -> Iterator[PackedDataset]:
        """A worker that ends afterwards."""
        before = self._stack
        with ExitStack() as self._stack:
            yield self.start(index)
        self._stack = before

    def kept(self, index: int) -> list[int]:
        return [p for p in range(PARTITIONS) if self._id and index in holders(self._id, p, workers=WORKERS, copies=2)]

    def copy(self, index: int, partition: int) -> Path:
        return self.disk(index) / "train" / file_name(partition)

    def until_filled(self, index: int) -> None:
        wait_for("the copies", lambda: all(self.copy(index, p).exists() for p in self.kept(index)), 20)

    def peer(self, index: int, transport: Transport | None = None, **changes: Any) -> Peer:
        """What another worker reads with."""
        hello = hello_of(self.config.model_copy(update=changes))
        peer = Peer(f"worker-{index}", self.config.addresses.copies[index], transport or self._transport, hello)
        self._stack.callback(peer.close)
        return peer

    def lose_the_volume(self) -> None:
        shutil.rmtree(self.root / "data")


class _Planted:
    def __len__(self) -> int:
        return 60

    def __getitem__(self, number: int) -> Any:
        return number, PLANTED * 100


@pytest.fixture(params=["plain", "TLS"])
def workers(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(tmp_path, stack, PLAIN if request.param == "plain" else certified(tmp_path / "certificate"))


def numbers(dataset: PackedDataset) -> list[int]:
    return [dataset[i][0] for i in range(60)]


def test_without_the_volume_every_worker_reads_all_from_copies(workers: Workers) -> None:
    datasets = [workers.start(index) for index in range(WORKERS)]
    for index in range(WORKERS):
        workers.until_filled(index)
    workers.lose_the_volume()
    assert all(numbers(dataset) == list(range(60)) for dataset in datasets)


def test_a_worker_whose_disk_was_wiped_gets_its_copies_from_the_others(workers: Workers) -> None:
    wiped, _, _ = (workers.start(index) for index in range(WORKERS))
    for index in range(WORKERS):
        workers.until_filled(index)
    for kept in workers.kept(0):
        assert wiped[kept * 60 // PARTITIONS][0] == kept * 60 // PARTITIONS, "its own copy is read"
    for path in workers.disk(0).rglob("*.blocks"):
        path.write_bytes(b"")  # what it has open is empty, too
    workers.lose_the_volume()
    assert numbers(wiped) == list(range(60))
    workers.until_filled(0)


def test_a_copy_that_is_damaged_is_not_used_and_is_made_again(workers: Workers) -> None:
    one, _, _ = (workers.start(index) for index in range(WORKERS))
    for index in range(WORKERS):
        workers.until_filled(index)
    copy = workers.copy(0, workers.kept(0)[0])
    good = copy.read_bytes()
    copy.write_bytes(good[:50] + bytes([good[50] ^ 1]) + good[51:])
    assert numbers(one) == list(range(60))
    wait_for("the copy", lambda: copy.exists() and copy.read_bytes() == good, 20)


def test_a_copy_that_is_gone_is_made_again(workers: Workers) -> None:
    workers.start(0)
    workers.until_filled(0)
    copy = workers.copy(0, workers.kept(0)[0])
    copy.unlink()
    again = workers.start(1)
    workers.until_filled(1)
    assert numbers(again) == list(range(60))


def test_no_disk_shows_a_sample_of_an_encrypted_data_set(workers: Workers) -> None:
    workers.start(0)
    workers.until_filled(0)
    files = [path for path in workers.disk(0).rglob("*") if path.is_file()]
    assert len(files) == len(workers.kept(0)) + 1 > 1, "and the index"
    assert not any(PLANTED in path.read_bytes() for path in files)
    assert all(path.read_bytes() == (workers.root / "data" / "train" / path.name).read_bytes() for path in files)


def test_a_peer_answers_with_the_bytes_as_they_are_stored(workers: Workers) -> None:
    workers.start(0)
    workers.until_filled(0)
    kept = workers.kept(0)[0]
    missing = next(p for p in range(PARTITIONS) if p not in workers.kept(0))
    stored = (workers.root / "data" / "train" / file_name(kept)).read_bytes()
    asked = workers.peer(0)
    assert asked.read("train", kept, 10, 100) == stored[10:110]
    assert asked.read("train", missing, 0, 10) is None
    assert asked.read("train", kept, len(stored) - 5, 10) is None, "behind its end"
    assert asked.read("train", kept, 0, 10) == stored[:10], "and it goes on"


@pytest.mark.parametrize("other", [{"uid": "another"}, {"attempt": 2}])
def test_a_peer_of_another_job_or_attempt_gets_nothing(workers: Workers, other: dict[str, Any]) -> None:
    workers.start(0)
    workers.until_filled(0)
    assert workers.peer(0, **other).read("train", workers.kept(0)[0], 0, 10) is None


@pytest.mark.parametrize("workers", ["TLS"], indirect=True)
def test_a_peer_without_the_certificate_of_the_attempt_gets_nothing(workers: Workers, tmp_path: Path) -> None:
    workers.start(0)
    workers.until_filled(0)
    for other in (PLAIN, certified(tmp_path / "other")):
        assert workers.peer(0, other).read("train", workers.kept(0)[0], 0, 10) is None
    assert workers.peer(0).read("train", workers.kept(0)[0], 0, 10) is not None


def test_without_any_peer_the_volume_is_read(workers: Workers) -> None:
    assert numbers(workers.start(2)) == list(range(60))


def test_a_worker_that_comes_without_the_volume_gets_the_index_from_the_others(workers: Workers) -> None:
    for index in (0, 1):
        workers.start(index)
        workers.until_filled(index)
    workers.lose_the_volume()
    replaced = workers.start(2)
    kept = {p for index in (0, 1) for p in workers.kept(index)}
    there = [number for number in range(60) if number * PARTITIONS // 60 in kept]
    assert [replaced[number][0] for number in there] == there
    wait_for("the copies", lambda: all(workers.copy(2, p).exists() for p in workers.kept(2) if p in kept), 20)


def test_a_worker_that_is_started_again_reads_its_own_index(workers: Workers) -> None:
    with workers.alone(0):
        workers.until_filled(0)
    workers.lose_the_volume()
    with workers.alone(0) as again:
        kept = workers.kept(0)[0]
        assert again[kept * 10][0] == kept * 10


def test_a_broken_copy_hides_no_intact_one_and_is_made_again(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    for index in (1, 2, 0):  # the reader finds the others there, and asks them in order
        reader = workers.start(index)
        workers.until_filled(index)
    partition = next(p for p in range(PARTITIONS) if p not in workers.kept(0))
    asked_first = holders(workers.index.id, partition, workers=WORKERS, copies=2)[0]
    copy = workers.copy(asked_first, partition)
    good = copy.read_bytes()
    copy.write_bytes(b"broken" + good[6:])
    workers.lose_the_volume()
    assert reader[partition * 10 + 5][0] == partition * 10 + 5
    wait_for("the copy", lambda: copy.exists() and copy.read_bytes() == good, 20)
    assert re.search(
        r"the copy of train/part-\d+\.blocks on worker-[12] is broken \(broken copy number 1 ", caplog.text
    )


def test_a_worker_that_is_frozen_costs_a_fraction_of_a_second(tmp_path: Path) -> None:
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as frozen:
        workers = Workers(tmp_path, stack, PLAIN)
        addresses = list(workers.config.addresses.copies)
        for index in (1, 2):
            workers.start(index)
            workers.until_filled(index)
        addresses[1] = f"127.0.0.1:{frozen.getsockname()[1]}"  # it accepts, and says nothing
        changed = workers.config.addresses.model_copy(update={"copies": tuple(addresses)})
        began = time.monotonic()
        reader = workers.start(0, addresses=changed)
        assert numbers(reader) == list(range(60))
        assert time.monotonic() - began < 4, "a silent peer is waited for 5 s"


def test_a_disk_that_is_wiped_while_its_files_are_open_is_filled_again(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies_module, "CHECK_SECONDS", 0.1)
    wiped, _, _ = (workers.start(index) for index in range(WORKERS))
    for index in range(WORKERS):
        workers.until_filled(index)
    assert numbers(wiped) == list(range(60)), "its files are open now"
    shutil.rmtree(workers.disk(0))
    workers.lose_the_volume()
    assert numbers(wiped) == list(range(60)), "nothing is lost"
    workers.until_filled(0)
    wait_for("the index", (workers.disk(0) / "train" / "index.json").exists, 20)
    assert numbers(wiped) == list(range(60))


def test_copies_that_cannot_be_made_are_one_line_until_they_can(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copies_module, "CHECK_SECONDS", 0.05)
    folder = workers.root / "data" / "train"
    with monkeypatch.context() as broken:
        broken.setattr(Folder, "read", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
        workers.start(0)
        wait_for("the line", lambda: "copies cannot be made" in caplog.text, 20)
        time.sleep(0.3)  # some more passes
        assert caplog.text.count("cannot be made") == 1
        assert f"{len(workers.kept(0))} copies cannot be made, such as train/part-" in caplog.text
        assert "Input/output error; they are read elsewhere" in caplog.text
    assert folder.is_dir()
    workers.until_filled(0)


def test_the_room_of_the_copies_is_taken_before_they_are_made(workers: Workers) -> None:
    folder = CopyFolder(workers.disk(0) / "train", workers.index)
    needed = folder.missing_bytes(workers.kept(0))
    assert needed == sum(workers.index.partitions[p].size for p in workers.kept(0)) > 0
    folder.reserve(workers.kept(0))
    taken = sum(path.stat().st_blocks * 512 for path in workers.disk(0).rglob("*.tmp"))
    assert taken >= needed
    assert folder.missing_bytes(workers.kept(0)) == 0, "what is reserved is not counted twice"


def test_a_disk_that_other_workers_have_filled_meanwhile_is_said_before_the_first_step(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        WrongInput, match=r"needs more than is free: No space left on device \(workers of one disk share"
    ):
        workers.start(0)
    assert not list(workers.disk(0).rglob("*.blocks*")), "and the room is free again"


def test_a_pod_that_may_not_have_the_room_says_so_before_the_kubelet_evicts_it(workers: Workers) -> None:
    needed = sum(workers.index.partitions[p].size for p in workers.kept(0))
    with pytest.raises(
        WrongInput,
        match=rf"keeps \d of 6 partitions of train, {needed} bytes, in .*, and needs more than the {needed - 1} bytes of "
        r"limits\.ephemeral-storage, beyond which it is evicted: lower it",
    ):
        workers.start(0, limit=needed - 1)
    workers.start(0, limit=needed)


def test_a_port_that_is_taken_is_named(workers: Workers) -> None:
    port = workers.config.addresses.copies[0].rpartition(":")[2]
    with (
        socket.create_server(("127.0.0.1", int(port)), reuse_port=False),
        pytest.raises(PeerLost, match=f"port {port}: the copies of the data cannot listen: Address already in use"),
    ):
        workers.start(0)


def test_a_disk_that_is_too_small_is_said_before_the_first_step(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(workers.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(
        WrongInput,
        match=r"data\.replication is 2 for 3 workers: this one keeps \d of 6 partitions of train, \d+ bytes, in .*, "
        r"and needs \d+ bytes for train where 100 are free \(workers of one disk share its room\): lower it",
    ):
        workers.start(0)
