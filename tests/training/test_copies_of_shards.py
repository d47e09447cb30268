"""The copy of a shard on another server: the bits of its primary, whatever the consistency, and what a promotion leaves."""

import contextlib
import socket
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from disttrain.api.runtime import JobConfig
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.net.frames import Op
from disttrain_trainer.parameter_server import ShardedClient, ShardServer
from disttrain_trainer.parameter_server.shard_file import ShardFile
from disttrain_trainer.runtime.sockets import split_address
from training.parameter_servers import (
    ADAM,
    ASYNC,
    MOMENTUM,
    SYNC,
    Worker,
    bounded,
    enter,
    make_client,
    make_config,
    push_header,
    serving,
)

PARTS = 2


class Copies:
    """What the primaries said of their copies."""

    def __init__(self) -> None:
        self.said: list[tuple[int, int, bool]] = []
        self._changed = threading.Condition()

    def order(
        self,
        servers: list[ShardServer],
        shard: int,
        onto: int,
        *,
        primary: int | None = None,
        address: str | None = None,
    ) -> None:
        """The shard gets a copy on that server, and this returns when it is complete."""

        def changed(term: int, complete: bool) -> None:
            with self._changed:
                self.said.append((shard, term, complete))
                self._changed.notify_all()

        before = len(self.said)
        servers[shard if primary is None else primary].replicate(shard, onto, address or servers[onto].address, changed)
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.said) > before, 20)
            assert self.said[-1][0] == shard
            assert self.said[-1][2]

    def until(self, what: tuple[int, int, bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: what in self.said, 20), self.said


class Relay:
    """A network between a primary and its copy that falls silent when it is told to."""

    def __init__(self, address: str) -> None:
        self._to = split_address(address)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._silent = threading.Event()

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for end in self._ends:
            end.close()

    def stop_relaying(self) -> None:
        self._silent.set()

    def _accept(self) -> None:
        near = self._listener.accept()[0]
        far = socket.create_connection(self._to)
        self._ends = (near, far)
        for one, other in ((near, far), (far, near)):
            threading.Thread(target=self._relay, args=(one, other), daemon=True).start()

    def _relay(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if not self._silent.is_set():
                    other.sendall(data)


def equal(one: ShardFile, other: ShardFile) -> bool:
    same = (one.version, one.applied.intervals(), one.updates, one.missed) == (
        other.version, other.applied.intervals(), other.updates, other.missed,
    )  # fmt: skip
    return same and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


CASES = [
    pytest.param(SYNC, MOMENTUM, torch.float32, id="Sync"),
    pytest.param(SYNC, ADAM, torch.bfloat16, id="Sync, bfloat16"),
    pytest.param(ASYNC, ADAM, torch.float32, id="Async"),
    pytest.param(ASYNC | {"staleLearningRate": "Inverse"}, MOMENTUM, torch.float32, id="Async, stale rate"),
    pytest.param(bounded(1), MOMENTUM, torch.bfloat16, id="BoundedStaleness, bfloat16"),
]


@pytest.mark.parametrize(("consistency", "optimizer", "dtype"), CASES)
def test_copy_has_the_bits_of_its_primary_after_each_step_and_takes_its_place(
    consistency: dict[str, Any], optimizer: dict[str, Any], dtype: torch.dtype
) -> None:
    config = in_parts(make_config(servers=2, consistency=consistency | {"replication": 2}, optimizer=optimizer))
    schedule = Schedule(samples=40, batch_size=12, parts_per_step=PARTS, seed=3, max_steps=20)
    sync, copies, primary = consistency is SYNC, Copies(), 0

    def step(client: ShardedClient, number: int) -> None:
        for index in range(number * PARTS, (number + 1) * PARTS):
            part = schedule.part(index)
            client.pull(worker.flat.parameters, step=number if sync else None)
            client.push(part, worker.gradient(part))

    with serving(config) as servers:
        worker = Worker(dtype)
        client = enter(make_client(servers, config), worker.flat, join=True)
        step(client, 0)
        copies.order(servers, 1, onto=0, primary=1)
        for number in range(1, 6):
            copies.order(servers, 0, onto=1 - primary, primary=primary)
            step(client, number)
            before = servers[primary].snapshot(0)
            servers[1 - primary].promote([(0, number + 1)])
            assert equal(before, servers[1 - primary].snapshot(0))
            copies.until((0, number, False))
            servers[primary].discard([(0, number)])
            client.close()
            primary = 1 - primary
            assert 0 in servers[primary].primaries
            assert 0 not in servers[1 - primary].primaries
            client = make_client(servers, config, primaries=(primary, 1), clock=client.clock)
            client.connect(worker.flat.layout)
            client.join()
        versions = client.pull(worker.flat.parameters, step=6 if sync else None)
        assert versions == ((6, 6) if sync else (12, 12))


def test_synchronous_training_over_promoted_copies_has_the_bits_of_a_calm_one() -> None:
    """In the middle of a step, too: what the lost primary had of it is pushed again."""
    config = in_parts(make_config(servers=2, consistency=SYNC | {"replication": 2}, optimizer=ADAM))
    schedule = Schedule(samples=40, batch_size=12, parts_per_step=PARTS, seed=3, max_steps=20)

    def run(*, lost: bool) -> torch.Tensor:
        copies = Copies()
        with serving(config) as servers:
            worker = Worker()
            client = enter(make_client(servers, config), worker.flat, join=True)
            for shard in range(2):
                copies.order(servers, shard, onto=1 - shard)
            for index in range(4 * PARTS):
                part = schedule.part(index)
                client.pull(worker.flat.parameters, step=part.step)
                gradient = worker.gradient(part)
                if lost and index == 3:
                    servers[0].stop()
                    servers[1].promote([(0, 2)])
                    client.close()
                    client = make_client([servers[1]] * 2, config)
                    client.connect(worker.flat.layout)
                    first = schedule.part(2)
                    assert client.versions == (1, 1)
                    client.pull(worker.flat.parameters, step=1)
                    client.push(first, worker.gradient(first))
                    gradient = worker.gradient(part)
                client.push(part, gradient)
            client.pull(worker.flat.parameters, step=4)
            return worker.flat.parameters[0].clone()

    assert torch.equal(run(lost=False), run(lost=True))


def test_worker_hears_of_an_update_when_the_copy_has_it_and_a_lost_copy_holds_up_no_worker() -> None:
    config = make_config(servers=2, consistency=ASYNC | {"replication": 2}, peer_timeout=1)
    schedule = Schedule(samples=40, batch_size=4, parts_per_step=1, seed=3, max_steps=20)
    with serving(config) as servers:
        worker, copies = Worker(), Copies()
        client = enter(make_client(servers, config), worker.flat, join=True)
        with Relay(servers[1].address) as relay:
            copies.order(servers, 0, onto=1, address=relay.address)
            client.push(schedule.part(0), worker.gradient(schedule.part(0)))
            assert copies.said == [(0, 1, True)]
            relay.stop_relaying()
            client.push(schedule.part(1), worker.gradient(schedule.part(1)))
            assert copies.said == [(0, 1, True), (0, 1, False)], "the master knows before the worker does"
        client.push(schedule.part(2), worker.gradient(schedule.part(2)))
        assert servers[0].state().applied.floor == 3


def test_buffers_of_a_step_are_copied() -> None:
    config = make_config(servers=2, consistency=SYNC | {"replication": 2})
    schedule = Schedule(samples=40, batch_size=4, parts_per_step=1, seed=3, max_steps=20)
    with serving(config) as servers:
        worker, copies = Worker(), Copies()
        client = enter(make_client(servers, config), worker.flat, join=True)

        def step(number: int) -> None:
            client.keep_buffers(number, b"buffers %d" % number)
            client.push(schedule.part(number), worker.gradient(schedule.part(number)))

        step(0)
        copies.order(servers, 0, onto=1)
        step(1)
        servers[1].promote([(0, 2)])
        client.close()
        client = make_client(servers, config, primaries=(1, 1))
        client.connect(worker.flat.layout)
        assert [client.fetch_buffers(number) for number in range(3)] == [b"", b"buffers 0", b"buffers 1"]


def test_copy_of_a_replaced_primary_and_of_another_job_is_refused() -> None:
    config = make_config(servers=2, consistency=SYNC | {"replication": 2})
    other = make_config(servers=2, consistency=SYNC | {"replication": 2}, uid="uid-2")
    with serving(config) as servers, serving(other) as others:
        worker, copies = Worker(), Copies()
        enter(make_client(servers, config), worker.flat)
        enter(make_client(others, other), worker.flat)
        copies.order(servers, 0, onto=1)
        servers[1].promote([(0, 2)])
        for shard, primary in ((0, servers[0]), (1, others[1])):
            lost = threading.Event()
            primary.replicate(shard, 1, servers[1].address, lambda _, complete, lost=lost: complete or lost.set())
            assert lost.wait(10)
        assert servers[1].primaries == (0, 1)


def in_parts(config: JobConfig) -> JobConfig:
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"parts_per_step": PARTS})})


def test_copy_that_begins_with_a_version_has_the_one_before_for_a_worker_of_a_shard_that_is_behind() -> None:
    config = make_config(servers=2, consistency=SYNC | {"replication": 2}, optimizer=MOMENTUM)
    schedule = Schedule(samples=40, batch_size=4, parts_per_step=1, seed=3, max_steps=20)
    with serving(config) as servers:
        worker, copies = Worker(), Copies()
        client = enter(make_client(servers, config), worker.flat)
        client.push(schedule.part(0), worker.gradient(schedule.part(0)))
        client.pull(worker.flat.parameters, step=1)
        before = worker.flat.parameters[0].clone()
        shard, part = client.connections[0], schedule.part(1)
        gradient = worker.gradient(part)
        assert gradient is not None
        shard.send(push_header(client, shard, part), shard.views(gradient))  # the other shard does not get it
        shard.receive(Op.DONE)
        copies.order(servers, 0, onto=1)
        servers[1].promote([(0, 2)])
        client.close()
        client = make_client(servers, config, primaries=(1, 1))
        client.connect(worker.flat.layout)
        assert client.versions == (2, 1)
        assert client.pull(worker.flat.parameters, step=1) == (1, 1)
        assert torch.equal(worker.flat.parameters[0], before)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_copy_follows_a_step_whose_parts_have_no_gradient(clip: float | None) -> None:
    """As a step whose parts are left out, since they led to a loss that was not finite."""
    config = make_config(servers=2, consistency=SYNC | {"replication": 2}, optimizer=ADAM, clip=clip)
    schedule = Schedule(samples=40, batch_size=4, parts_per_step=1, seed=3, max_steps=20)
    with serving(config) as servers:
        worker, copies = Worker(), Copies()
        client = enter(make_client(servers, config), worker.flat, join=True)
        client.pull(worker.flat.parameters, step=0)
        copies.order(servers, 0, onto=1)
        for step in range(4):
            part = schedule.part(step)
            if step in (0, 2):
                part = replace(part, samples=0)
            client.push_pull(part, worker.gradient(part), worker.flat.parameters, step + 1)
        primary = worker.flat.parameters[0].clone()
        servers[1].promote([(0, 2)])
        client.close()
        client = make_client(servers, config, primaries=(1, 1))
        client.connect(worker.flat.layout)
        assert client.pull(worker.flat.parameters, step=4) == (4, 4)
        assert torch.equal(worker.flat.parameters[0], primary)
