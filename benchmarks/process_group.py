"""What our process group costs a DDP step: the same step over plain gloo and over ours, in turns, in the same two processes.

    python benchmarks/process_group.py            # a table; a ratio of 1.00 is a group that costs nothing, above it is faster

The step is that of the trainer: gradients in buckets that are summed while backward runs (`parallel/replicate.py`), and the optimiser's
step. FSDP2's is beside it: its operations are other ones, and more.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import Work  # type: ignore[attr-defined]  # missing in its __all__
from torch.distributed.fsdp import fully_shard

from disttrain.api.optimizer import Optimizer
from disttrain_trainer.examples import charlm, digits
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.parallel.process_group import AbortableProcessGroup
from disttrain_trainer.parallel.replicate import Replicated
from ranks import RANKS, TIMEOUT, measure, store

BATCH = 32
Step = Callable[[], None]


class Plain(AbortableProcessGroup):
    """gloo as torch gives it."""

    def all_reduce(self, tensor: torch.Tensor) -> Work:
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        return work


def replicated(
    group: AbortableProcessGroup, module: nn.Module, batch: list[torch.Tensor], loss: Callable[..., torch.Tensor]
) -> Step:
    """A step of our own DDP."""
    flat = FlatModel(module)
    settings = Optimizer.model_validate({"name": "SGD", "learningRate": 0.001, "momentum": 0.9})
    optimizer, replica = FlatOptimizer(settings, flat), Replicated(flat, group=group)

    def step() -> None:
        flat.zero_grad()
        total = loss(module, batch) / RANKS
        replica.begin(total)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step(flat.gradients(), replica.finish(weight=1 / RANKS, own=False, alive=lambda: True))

    return step


def sharded(width: int) -> Step:
    """A step of FSDP2, over the default group of the moment."""
    module = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    for layer in module:
        fully_shard(layer)
    fully_shard(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.001)
    inputs = torch.randn(BATCH, width)

    def step() -> None:
        optimizer.zero_grad()
        module(inputs).square().mean().backward()
        optimizer.step()

    return step


def make(name: str, group: AbortableProcessGroup) -> Step:
    torch.manual_seed(0)
    if name == "fsdp2":
        return sharded(512)
    example = {"digits": digits, "charlm": charlm}[name]
    data = example.dataset({}, "train")
    batch = [torch.stack(column) for column in zip(*(data[number] for number in range(BATCH)), strict=True)]
    return replicated(group, example.model({}), batch, example.loss)


def run(results: Connection, rank: int, port: int, model: str, steps: int, rounds: int) -> None:
    """One rank. Sends, for each group, seconds and CPU seconds a step, one pair for each turn."""
    torch.set_num_threads(1)

    group = AbortableProcessGroup()
    with group.joined("gloo", store=store(port), rank=rank, size=RANKS, timeout=TIMEOUT):
        groups = {"ours": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
        turns: dict[str, Step] = {}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in groups}
        for turn in range(rounds + 1):
            for name in list(groups) if turn % 2 else reversed(groups):
                dist.group.WORLD = groups[name]
                if name not in turns:
                    turns[name] = make(model, group if name == "ours" else Plain())
                dist.barrier()
                began, used = time.perf_counter(), time.process_time()
                for _ in range(steps):
                    turns[name]()
                if turn:  # the first one warms up
                    found[name].append(((time.perf_counter() - began) / steps, (time.process_time() - used) / steps))
        dist.group.WORLD = groups["ours"]
    results.send(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=25, help="turns of each group")
    options = parser.parse_args()
    print(f"{'model':<8} {'gloo ms/step':>12} {'best':>6} {'median':>7} {'CPU':>6}   gloo / ours; target 0.98")
    for model, steps in (("digits", 100), ("charlm", 10), ("fsdp2", 10)):
        found = measure(run, model, steps, options.rounds)
        seconds, used = ({name: [turn[at] for turn in turns] for name, turns in found.items()} for at in (0, 1))
        median = statistics.median(gloo / ours for gloo, ours in zip(seconds["gloo"], seconds["ours"], strict=True))
        best, cpu = (min(kind["gloo"]) / min(kind["ours"]) for kind in (seconds, used))
        print(f"{model:<8} {min(seconds['gloo']) * 1e3:>12.3f} {best:>6.3f} {median:>7.3f} {cpu:>6.3f}")


if __name__ == "__main__":
    main()
