"""What network.tls Mutual costs a DDP step: 32 MiB of gradients and 30 ms of compute, two ranks on loopback.

    python benchmarks/encrypted.py [--rounds 10] [--steps 5] [--mib 32] [--compute 30]

- gloo: torch's own group, plain
- ours: connections of ours under TLS 1.3 (`parallel/wire_backend.py`)
- bare: the bytes of ours over the same kind of connections, with no sum and no protocol: the limit

Each is the step of the trainer (`parallel/replicate.py`): gradients in buckets that are summed while backward runs. All take turns, so
that whatever else the machine does hits each of them. Compare ratios, not times.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn

from disttrain import certificates
from disttrain.api.job import Metadata
from disttrain.api.runtime import Addresses, JobConfig
from disttrain.api.strategy import Strategy
from disttrain.api.trainer import Trainer
from disttrain_trainer.model.flat import FlatModel, bytes_of
from disttrain_trainer.net import transport
from disttrain_trainer.parallel.backend import RoundEnd
from disttrain_trainer.parallel.operation import Operation
from disttrain_trainer.parallel.process_group import AbortableProcessGroup
from disttrain_trainer.parallel.replicate import Replicated
from disttrain_trainer.parallel.wire import Wire
from process_group import Plain

RANKS, LAYERS = 2, 8
TIMEOUT = timedelta(seconds=300)
TARGET = 3.0
Step = Callable[[], None]


class Busy(torch.autograd.Function):
    """A layer whose backward computes for as long as its gradient takes elsewhere."""

    work: Step = staticmethod(lambda: None)

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Busy.work()
        (weight,) = ctx.saved_tensors
        return gradients[0], torch.full_like(weight, 0.5)


def work_of(seconds: float) -> Step:
    """Arithmetic that takes so long on an idle core: always the same amount."""
    one, other = torch.randn(128, 128), torch.randn(128, 128)
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(20):
            one @ other
        taken.append((time.perf_counter() - began) / 20)
    count = max(1, round(seconds / min(taken)))

    def work() -> None:
        for _ in range(count):
            one @ other

    return work


def config_of_benchmark() -> JobConfig:
    return JobConfig.model_validate(
        {
            "namespace": "default",
            "name": "benchmark",
            "uid": "benchmark",
            "attempt": 1,
            "strategy": Strategy.model_validate({"type": "DataParallel"}),
            "trainer": Trainer.model_validate({"command": ["true"]}),
            "workers": RANKS,
            "tls": "Mutual",
            "addresses": Addresses(control="localhost:1", rendezvous="localhost:2"),
        }
    )


def ours(group: AbortableProcessGroup, elements: int) -> Step:
    module = nn.ParameterList([torch.zeros(elements // LAYERS) for _ in range(LAYERS)])
    flat = FlatModel(module)
    replica = Replicated(flat, group=group)

    def step() -> None:
        flat.zero_grad()
        total = torch.zeros((), requires_grad=True)
        for weight in module:
            total = Busy.apply(total, weight)  # type: ignore[no-untyped-call]
        replica.begin(total)
        total.backward()  # type: ignore[no-untyped-call]
        replica.finish(weight=1 / RANKS, own=False, alive=lambda: True)

    return step


def bare(rank: int, link: transport.Transport, elements: int) -> Step:
    wire = Wire(transport=link, host="127.0.0.1", rank=rank, size=RANKS, timeout=300, on_messages=lambda *_: None)
    places: list[Any] = [None] * RANKS
    dist.all_gather_object(places, wire.place)
    wire.connect(places)
    (peer,) = wire.peers
    sent, received = torch.zeros(elements), torch.empty(elements)

    def step() -> None:
        operation = Operation(None, limit=300, round_end=RoundEnd())
        wire.outgoing[peer].send(b"", bytes_of(sent), operation)
        operation.end_part()
        reading = threading.Thread(target=wire.incoming[peer].fill, args=(bytes_of(received),))
        reading.start()
        for _ in range(LAYERS):
            Busy.work()
        reading.join()
        operation.wait()

    return step


def run(results: Connection, rank: int, port: int, tls: Path, options: argparse.Namespace) -> None:
    """One rank. Sends, for each way, seconds a step of each turn."""
    torch.set_num_threads(1)
    elements = (options.mib << 20) // 4
    link = transport.of(config_of_benchmark(), tls)

    def store() -> dist.Store:
        return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)

    group = AbortableProcessGroup(transport=link)
    with group.joined("gloo", store=store, rank=rank, size=RANKS, timeout=TIMEOUT):
        groups = {"gloo": dist.new_group(backend="gloo"), "ours": dist.group.WORLD}
        turns = {"gloo": ours(Plain(), elements), "ours": ours(group, elements), "bare": bare(rank, link, elements)}
        Busy.work = work_of(options.compute / 1e3 / LAYERS)
        found: dict[str, list[float]] = {name: [] for name in turns}
        for turn in range(options.rounds + 1):
            for name in list(turns) if turn % 2 else reversed(turns):
                dist.group.WORLD = groups.get(name, groups["ours"])
                dist.barrier()
                began = time.perf_counter()
                for _ in range(options.steps):
                    turns[name]()
                if turn:  # the first one warms up
                    found[name].append((time.perf_counter() - began) / options.steps)
        dist.group.WORLD = groups["ours"]
    results.send(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn")
    parser.add_argument("--mib", type=int, default=32, help="MiB of gradients")
    parser.add_argument("--compute", type=float, default=30, help="ms of compute in backward")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results, theirs = spawn.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        job = Metadata(name="benchmark", namespace="default", uid="benchmark")
        made = certificates.of_attempt(job, 1, now=datetime.now(UTC), lifetime=timedelta(hours=1))
        for name, content in made.items():
            (Path(folder) / name).write_bytes(content)
        ranks = [
            spawn.Process(target=run, args=(theirs, rank, server.port, Path(folder), options), daemon=True)
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        found: dict[str, list[float]] = results.recv()
        for rank in ranks:
            rank.join()
    print(f"{options.mib} MiB, {options.compute:g} ms of compute, best of {options.rounds} turns")
    print(f"{'':<6}{'ms/step':>9}{'/ gloo':>9}{'median':>9}   target {TARGET:g}")
    for name, seconds in found.items():
        median = statistics.median(one / gloo for one, gloo in zip(seconds, found["gloo"], strict=True))
        print(f"{name:<6}{min(seconds) * 1e3:>9.1f}{min(seconds) / min(found['gloo']):>9.2f}{median:>9.2f}")


if __name__ == "__main__":
    main()
