"""A copy that cannot be begun costs the training nothing: parameter_server/copy_sender.py and replicated_host.py."""

import socket
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from configs import config_of
from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import ParameterServerStrategy
from disttrain.api.trainer import Loop
from disttrain_trainer.checkpoint.background import HostCopy
from disttrain_trainer.model.flat import Layout
from disttrain_trainer.net.connection import Connection
from disttrain_trainer.net.frames import Refusal
from disttrain_trainer.net.transport import PLAIN
from disttrain_trainer.parameter_server import copy_sender
from disttrain_trainer.parameter_server.held_shards import HeldShards
from disttrain_trainer.parameter_server.host_factory import HostFactory
from disttrain_trainer.parameter_server.optimizer import Optimizer, settings_of
from disttrain_trainer.parameter_server.replicated_host import ReplicatedHost
from disttrain_trainer.parameter_server.sessions import Gradient, Session, Waiting
from disttrain_trainer.parameter_server.update_log import MOST_WAITING

CONFIG = config_of(
    {
        "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Sync", "replication": 2}},
        "parameterServer": {"replicas": 2},
        "worker": {"replicas": 1},
        "trainer": {"model": "m:m", "dataset": "m:d", "optimizer": {"name": "SGD", "learningRate": 0.1}, "maxSteps": 9},
    }
)
SESSION = Session(0, "a")


def hosts() -> HostFactory:
    loop, strategy = CONFIG.trainer.work, CONFIG.strategy.exchange
    assert isinstance(loop, Loop)
    assert isinstance(strategy, ParameterServerStrategy)
    return HostFactory(
        CONFIG, strategy, optimizer=lambda: Optimizer(settings_of(strategy, loop.optimizer)), on_staleness=None
    )


def primary() -> ReplicatedHost:
    """Of shard 0, with a worker and without parameters."""
    host = hosts().primary(1, 0, None)
    host.enter(SESSION, Layout.of(nn.ParameterList([torch.zeros(100)])))
    return host


def goes_on(host: ReplicatedHost, *, within: float = 0.1) -> bool:
    """Whether a request waits no longer than so many seconds for a copy, after more changes than may wait for one."""
    for _ in range(MOST_WAITING + 1):
        host.keep(SESSION, 0, b"buffers")
    try:
        host.settle(Waiting(timeout_seconds=within, heartbeat_seconds=0.1, still_waiting=lambda reason: None))
    except Refusal:
        return False
    return True


class Dialing:
    """A network on which this happens instead of dialing."""

    def __init__(self, dial: Callable[[], Connection]) -> None:
        self._dial = dial

    def dial(self, address: str, **options: object) -> Connection:
        return self._dial()


class Said:
    """What a sender says of its copy."""

    def __init__(self) -> None:
        self.complete: bool | None = None
        self._there = threading.Event()

    def changed(self, complete: bool) -> None:
        self.complete = complete
        self._there.set()

    def wait(self) -> bool | None:
        assert self._there.wait(20)
        return self.complete


def sender(host: ReplicatedHost, transport: Dialing, said: Said) -> copy_sender.CopySender:
    return copy_sender.CopySender(
        host,
        shard=0,
        config=CONFIG,
        own=0,
        server=1,
        address="127.0.0.1:9",
        transport=transport,  # type: ignore[arg-type]
        changed=said.changed,
    )


def test_workers_do_not_wait_while_the_server_of_a_copy_does_not_answer() -> None:
    host, dials, answers, said = primary(), threading.Event(), threading.Event(), Said()
    host.initialize(host.take())

    def silent() -> Connection:
        dials.set()
        answers.wait(20)
        raise OSError("no route to host")

    sender(host, Dialing(silent), said).start()
    try:
        assert dials.wait(20)
        assert goes_on(host)
    finally:
        answers.set()
    assert said.wait() is False


def test_copy_that_fails_in_an_unexpected_way_is_lost_and_no_worker_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, said = primary(), Said()
    host.initialize(host.take())

    def failing(config: JobConfig) -> str:
        assert not goes_on(host), "the log has begun"
        raise RuntimeError("out of threads")

    monkeypatch.setattr(copy_sender, "config_digest", failing)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        sender(host, Dialing(lambda: PLAIN.accept(near, timeout=20)), said).start()
        assert said.wait() is False
        assert goes_on(host, within=20)


def test_snapshot_that_cannot_be_made_begins_no_log() -> None:
    class Full(HostCopy):
        def take(self, tensors: object) -> dict[str, torch.Tensor]:
            raise MemoryError

    host = primary()
    host.initialize(host.take())
    with pytest.raises(MemoryError):
        host.begin_log(host.new_log(), Full())
    assert goes_on(host)


def test_sender_that_was_stopped_before_there_were_parameters_does_not_end_the_log_of_its_successor() -> None:
    host = primary()
    stopped, successor = host.new_log(), host.new_log()
    host.end_log(stopped)
    with pytest.raises(Refusal, match="not wanted any more"):
        host.await_parameters(stopped)
    host.initialize(host.take())
    host.begin_log(successor, HostCopy())
    with pytest.raises(Refusal, match="not wanted any more"):
        host.begin_log(stopped, HostCopy())
    assert not successor.over
    assert not goes_on(host), "the log of the successor is the one that is kept"


def test_server_that_holds_copies_alone_knows_how_far_they_are() -> None:
    """A process that seems to be at step 0 for ever is taken for one that crashes again and again."""
    host = primary()
    host.initialize(host.take())
    gradient = Gradient(index=0, samples=8, batch_samples=8, clock=0, version=0, weight=None, took=None)
    host.push(SESSION, gradient, host.take())
    copy = hosts().copy(1, 0, host.begin_log(host.new_log(), HostCopy()).file, 1)
    held = HeldShards(threading.Condition())
    held.place_copy(1, 0, copy)
    assert (held.primaries, held.newest_version) == ((), 1)
