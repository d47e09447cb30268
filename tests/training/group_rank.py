"""A rank that trains in rounds, directly on the process group: a process that obeys commands.

Commands are tuples: (`round`, number, rank, size, source, until), (`end`,), (`count`,); a second thread takes them, as the control thread
of a worker does. Answers are dicts. A step is computed by all ranks of the round; each keeps the whole state after it, and the source of
the next round gives its own to all.
"""

import hashlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import transports
from disttrain_trainer.net.transport import PLAIN
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.process_group import AbortableProcessGroup
from disttrain_trainer.parallel.rendezvous_store import RendezvousStore

TIMEOUT = timedelta(seconds=60)
ROWS, WIDTH = 12, 256


def run(commands: Connection, backend: str, model: str, port: int, rendezvous: str, tls: Path) -> None:
    """The whole life of a rank. backend: disttrain, tls, or gloo. model: ddp, or fsdp. port: of torch's store. rendezvous: address of
    ours. tls: folder of the certificate."""
    torch.set_num_threads(1)
    Rank(commands, backend, model, port, rendezvous, tls).run()


class Rank:
    def __init__(self, commands: Connection, backend: str, model: str, port: int, rendezvous: str, tls: Path) -> None:
        self._connection = commands
        self._backend, self._model, self._port, self._rendezvous = backend, model, port, rendezvous
        self._transport = transports.certified_by(tls) if backend == "tls" else PLAIN
        self._rounds: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self.group: AbortableProcessGroup | None = None
        self.ended = 0.0
        torch.manual_seed(0)
        self.step = 0
        self.kept = {name: tensor.clone() for name, tensor in make_model().state_dict().items()}

    def answer(self, **fields: Any) -> None:
        self._connection.send(fields)

    def listen(self) -> None:
        while True:
            match self._connection.recv():
                case ("end",):
                    self.ended = time.monotonic()
                    if self.group is not None:
                        self.group.end()
                case ("count",):
                    self.answer(threads=len(os.listdir("/proc/self/task")), files=len(os.listdir("/proc/self/fd")))
                case ("round", *words):
                    self._rounds.put(words)

    def run(self) -> None:
        threading.Thread(target=self.listen, daemon=True).start()
        self.answer(ready=os.getpid())
        while True:
            number, rank, size, source, until = self._rounds.get()
            try:
                with self.joined(number, rank, size):
                    self.train(rank, size, source, until)
                self.answer(done=self.step, digest=digest(self.kept))
            except (BrokenGroup, RuntimeError) as error:
                late = time.monotonic() - self.ended if self.ended else 0.0
                self.answer(broken=str(error), late=late, step=self.step)

    @contextmanager
    def joined(self, number: int, rank: int, size: int) -> Iterator[None]:
        def store() -> dist.Store:
            if self._backend == "tls":
                return RendezvousStore(self._transport, self._rendezvous, prefix=f"round-{number}", timeout=TIMEOUT)
            connected = dist.TCPStore("127.0.0.1", self._port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
            return dist.PrefixStore(f"round-{number}", connected)

        if self._backend == "gloo":
            dist.init_process_group("gloo", store=store(), rank=rank, world_size=size, timeout=TIMEOUT)
            yield
            dist.destroy_process_group()
            return
        self.group, self.ended = AbortableProcessGroup(transport=self._transport), 0.0
        with self.group.joined("gloo", store=store, rank=rank, size=size, timeout=TIMEOUT):
            yield

    def train(self, rank: int, size: int, source: int, until: int) -> None:
        begin = torch.tensor([self.step])
        dist.broadcast(begin, source)
        received = {name: tensor.clone() for name, tensor in self.kept.items()}
        for tensor in received.values():
            dist.broadcast(tensor, source)
        self.step, self.kept = int(begin), received
        model = make_model()
        model.load_state_dict(self.kept)
        wrapped = wrap(model, self._model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
        self.answer(begun=self.step)
        while self.step < until:
            inputs, targets = batch(self.step, rank, size)
            optimizer.zero_grad()
            (nn.functional.mse_loss(wrapped(inputs), targets)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
            self.step, self.kept = self.step + 1, state


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers)


def wrap(model: nn.Sequential, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def batch(step: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(2, ROWS, WIDTH, generator=generator)
    part = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    return rows[0][part], rows[1][part]


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(state[name].numpy().tobytes())
    return found.hexdigest()
