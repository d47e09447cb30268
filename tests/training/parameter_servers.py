"""Parameter servers and workers for the tests: in this process, with real sockets; and what they are held against."""

import contextlib
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from configs import config_of
from disttrain.api.runtime import JobConfig
from disttrain_trainer.coordinator.gradient_norms import GradientNorms
from disttrain_trainer.data.schedule import BatchPart, Schedule
from disttrain_trainer.net.frames import Header, Op
from disttrain_trainer.net.transport import PLAIN, Transport
from disttrain_trainer.parameter_server import FlatModel, ShardedClient, ShardServer
from disttrain_trainer.parameter_server.compression import Compression
from disttrain_trainer.parameter_server.connection import ServerConnection

T = TypeVar("T")
_SEEDING = threading.Lock()

SGD = {"name": "SGD", "learningRate": 0.1}
MOMENTUM = {"name": "SGD", "learningRate": 0.05, "momentum": 0.9, "weightDecay": 0.01}
NESTEROV = {"name": "SGD", "learningRate": 0.05, "momentum": 0.9, "nesterov": True}
ADAM = {"name": "Adam", "learningRate": 0.01, "weightDecay": 0.01}
ADAMW = {"name": "AdamW", "learningRate": 0.01, "beta1": 0.8, "weightDecay": 0.1}
SYNC = {"consistency": "Sync"}
ASYNC = {"consistency": "Async"}


def bounded(staleness: int) -> dict[str, object]:
    return {"consistency": "BoundedStaleness", "maxStaleness": staleness}


def make_config(
    *,
    workers: int = 1,
    servers: int = 1,
    consistency: dict[str, object] = SYNC,
    optimizer: dict[str, object] = SGD,
    uid: str = "uid-1",
    attempt: int = 1,
    peer_timeout: float = 20,
    startup_timeout: float = 30,
    clip: float | None = None,
) -> JobConfig:
    spec: dict[str, Any] = {
        "strategy": {"type": "ParameterServer", "parameterServer": consistency},
        "parameterServer": {"replicas": servers},
        "worker": {"replicas": workers},
        "trainer": {"model": "a:b", "dataset": "a:c", "epochs": 1, "optimizer": optimizer},
    }
    if clip is not None:
        spec["trainer"]["maxGradientNorm"] = clip
    timeouts = {"peer_timeout_seconds": peer_timeout, "startup_timeout_seconds": startup_timeout}
    return config_of(spec, uid=uid, attempt=attempt, **timeouts)


@contextlib.contextmanager
def serving(config: JobConfig, *, begin: bool = True, **options: object) -> Iterator[list[ShardServer]]:
    """Every server of the job, in its first round. Norms of gradients are told as by a master."""
    norms = _Norms()
    servers = [
        ShardServer(
            config=config,
            index=index,
            host="127.0.0.1",
            port=0,
            **{"on_sum": partial(norms.told.put, index), **options},  # type: ignore[arg-type]
        )
        for index in range(config.parameter_servers)
    ]
    norms.start(servers)
    try:
        for server in servers:
            server.start()
            if begin:
                server.begin(1, None)
        yield servers
    finally:
        for server in servers:
            server.stop()
        norms.stop()


class _Norms:
    """What the master does with the norms of gradients."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def start(self, servers: Sequence[ShardServer]) -> None:
        self._servers = servers
        self._norms = GradientNorms(shards=len(servers), serves=lambda *_: True)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self.told.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (index := self.told.get()) is not None:
            server = self._servers[index]
            message = {"generation": server.round_number, "norms": server.norm_parts()}
            for version, norm in self._norms.know(index, message):
                for one in self._servers:
                    one.take_norm(self._norms.round_number, version, norm)


def make_client(
    servers: Sequence[ShardServer],
    config: JobConfig,
    *,
    rank: int = 0,
    incarnation: str | None = None,
    round_number: int = 1,
    timeout: float = 10,
    clock: int = 0,
    primaries: Sequence[int] = (),
    transport: Transport = PLAIN,
    compression: Compression | None = None,
) -> ShardedClient:
    client = ShardedClient(
        addresses=[server.address for server in servers],
        config=config,
        rank=rank,
        incarnation=incarnation or uuid.uuid4().hex,
        round_number=round_number,
        timeout=timeout,
        clock=clock,
        primaries=primaries,
        transport=transport,
        compression=compression,
    )
    _clients.append(client)
    return client


_clients: list[ShardedClient] = []


def close_clients() -> None:
    """Of the test that ends: those that it has lost without a goodbye hold their connections."""
    while _clients:
        _clients.pop().close(goodbye=False)


def enter(client: ShardedClient, flat: FlatModel, *, join: bool = False) -> ShardedClient:
    """Connects, and offers the first parameters. join: it takes part."""
    client.connect(flat.layout)
    client.initialize(flat.parameters)
    if join:
        client.join()
    return client


def push_header(client: ShardedClient, connection: ServerConnection, part: BatchPart) -> Header:
    """What a worker sends to one server before the gradient of a part."""
    return Header(
        op=Op.PUSH,
        samples=part.samples,
        batch_samples=part.batch_samples,
        index=part.index,
        clock=client.clock,
        version=client.versions[connection.number],
        nbytes=connection.nbytes if part.samples else 0,
    )


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """10-20-10, seeded."""
    with _SEEDING:  # torch's generator is the process's
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 10)).to(dtype)


def regression(samples: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of shape (samples, 10)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 10, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(2 * x).to(dtype)


class Worker:
    """A worker's model and its gradient of a part, with no loop of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32, samples: int = 40) -> None:
        self.module = mlp(dtype)
        self.flat = FlatModel(self.module)
        self.x, self.y = regression(samples, dtype)

    def gradient(self, work: BatchPart) -> tuple[torch.Tensor, ...] | None:
        """Of the mean loss of the part."""
        if not work.samples:
            return None
        self.flat.zero_grad()
        at = torch.from_numpy(np.array(work.indices))
        nn.functional.mse_loss(self.module(self.x[at]), self.y[at]).backward()
        return self.flat.gradients()


def train_sync(
    *,
    workers: int,
    servers: int,
    optimizer: dict[str, object],
    steps: int,
    dtype: torch.dtype = torch.float32,
    samples: int = 40,
    batch_size: int = 12,
    before_push: Callable[[int, int], None] = lambda rank, step: None,
    clip: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """The parameters after some synchronous steps."""
    config = make_config(workers=workers, servers=servers, optimizer=optimizer, clip=clip)
    schedule = Schedule(samples=samples, batch_size=batch_size, parts_per_step=workers, seed=3, max_steps=steps)
    with serving(config) as shards:

        def work(rank: int) -> tuple[torch.Tensor, ...]:
            worker = Worker(dtype, samples)
            client = enter(make_client(shards, config, rank=rank), worker.flat, join=True)
            assert client.pull(worker.flat.parameters, step=0) == (0,) * servers
            for step in range(steps):
                part = schedule.part(step * workers + rank)
                gradient = worker.gradient(part)
                before_push(rank, step)
                versions = client.push_pull(part, gradient, worker.flat.parameters, step + 1)
                assert versions == (step + 1,) * servers
            client.close()
            return worker.flat.parameters

        results = in_threads([lambda rank=rank: work(rank) for rank in range(workers)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    return results[0]


def train_alone(
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
    dtype: torch.dtype,
    samples: int,
    batch_size: int,
    clip: float = float("inf"),
    norms: list[float] | None = None,
) -> torch.Tensor:
    """The same training in plain torch: one process, the whole batch. norms: gets those before the clip."""
    schedule = Schedule(samples=samples, batch_size=batch_size, parts_per_step=1, seed=3, max_steps=steps)
    module = mlp(dtype)
    x, y = regression(samples, dtype)
    stepper = optimizer(list(module.parameters()))
    for step in range(steps):
        at = torch.from_numpy(np.array(schedule.part(step).indices))
        stepper.zero_grad()
        nn.functional.mse_loss(module(x[at]), y[at]).backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
        if norms is not None:
            norms.append(float(norm))
        stepper.step()
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def in_threads(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of calls that run at the same time; the first exception is raised."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert len(results) == len(calls), "a thread hangs"
    return [results[number] for number in range(len(calls))]


def users(samples: int) -> str:
    """A module of factories for a job of processes: `mlp` and so many samples of `regression`, in float64."""
    return f"""
import torch
from torch import nn
from torch.utils.data import TensorDataset
from training.parameter_servers import mlp, regression

def model(config):
    return mlp(torch.float64)

def dataset(config, split):
    return TensorDataset(*regression({samples}, torch.float64))

def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])
"""
