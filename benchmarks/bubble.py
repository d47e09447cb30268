"""The bubble of a pipeline beside its formula: how long the processes of each schedule are idle.

    python benchmarks/bubble.py             # a table: idle share of the processes, measured and by the formula

Compute is sleep, so that the processes need no cores of their own: each stage sleeps as long for its forward as for the gradient of its
input and for that of its parameters. With p processes, m micro-batches and v stages in each process the formulas are

    GPipe, OneForwardOneBackward   (p - 1) / (m + p - 1)         Huang et al., arXiv:1811.06965
    Interleaved                    (p - 1) / (v m + p - 1)       Narayanan et al., arXiv:2104.04473
    ZeroBubble                     (p - 1) / (3 m + p - 1)       ZB-H1 of Qi et al., arXiv:2401.10241

What is measured has the messages in it, too.
"""

import argparse
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn

from disttrain.api.strategy import ModelParallel, Schedule
from disttrain_trainer.data import schedule
from disttrain_trainer.parallel import stages
from disttrain_trainer.parallel.chance import Chance
from disttrain_trainer.parallel.pipeline import Pipeline
from disttrain_trainer.parallel.process_group import AbortableProcessGroup
from ranks import TIMEOUT, measure, store

SAMPLES = 2
"""Of a micro-batch."""


class Sleep(torch.autograd.Function):
    """Returns the tensor; sleeps in forward and in backward."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        context.seconds = backward
        time.sleep(forward)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        time.sleep(context.seconds)
        return gradients[0], None, None


class Timed(nn.Module):
    """A stage that computes nothing: `seconds` each for forward, the gradient of the input and that of the parameter."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self._seconds = seconds

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not hidden.requires_grad and torch.is_grad_enabled():
            hidden = hidden.detach().requires_grad_()  # the first stage has the same to do
        through: torch.Tensor = Sleep.apply(hidden, self._seconds, self._seconds)  # type: ignore[no-untyped-call]
        own: torch.Tensor = Sleep.apply(self.weight, 0.0, self._seconds)  # type: ignore[no-untyped-call]
        return through + own


class Model(nn.Module):
    """The stages one after the other."""

    def __init__(self, count: int, seconds: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Timed(seconds) for _ in range(count))

    def pipeline_stages(self) -> list[nn.Module]:
        return list(self.stages)


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Something with a gradient."""
    found: torch.Tensor = model(batch).mean()
    return found


def formula(cut: ModelParallel) -> float:
    """The share of a step in which a process is idle."""
    p, m = cut.pipeline, cut.microbatches
    factor = {Schedule.INTERLEAVED: stages.count(cut) // p, Schedule.ZERO_BUBBLE: 3}.get(cut.schedule, 1)
    return (p - 1) / (factor * m + p - 1)


def run(results: Connection, rank: int, port: int, cut: ModelParallel, seconds: float, rounds: int) -> None:
    """One process. Sends the seconds of each step."""
    torch.set_num_threads(1)
    with AbortableProcessGroup().joined("gloo", store=store(port), rank=rank, size=cut.pipeline, timeout=TIMEOUT):
        count = stages.count(cut)
        model = Model(count, seconds * cut.pipeline / count)
        chance = Chance(model, seed=0, device=torch.device("cpu"))
        modules = stages.split(model, count, config={}, by_user=None)
        group = dist.group.WORLD
        assert group is not None
        pipeline = Pipeline(
            {number: modules[number] for number in stages.of(cut, rank)},
            cut=cut,
            group=group,
            microbatch=SAMPLES,
            loss=loss,
            chance=chance,
            device=torch.device("cpu"),
        )
        samples = SAMPLES * cut.microbatches
        plan = schedule.Schedule(samples=samples, batch_size=samples, parts_per_step=1, seed=0, max_steps=rounds + 1)
        found = []
        for number in range(rounds + 1):
            part = plan.part(number)
            dist.barrier()
            began = time.perf_counter()
            pipeline.begin(part)
            pipeline(torch.zeros(samples, 4), samples)
            dist.barrier()
            found.append(time.perf_counter() - began)
    if not rank:
        results.send(found[1:])  # the first one learns the shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument(
        "--milliseconds", type=float, default=20, help="of a forward of a process's stages; backward takes two of it"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{'schedule':<22} {'formula':>8} {'best':>6} {'median':>7}   idle share of {options.processes} processes")
    for order in Schedule:
        cut = ModelParallel(pipeline=options.processes, microbatches=options.microbatches, schedule=order)
        seconds = options.milliseconds / 1e3
        steps = measure(run, cut, seconds, options.rounds, count=cut.pipeline)
        found = [1 - 3 * seconds * cut.microbatches / step for step in steps]  # forward, and twice as long for backward
        print(f"{order.value:<22} {formula(cut):>8.3f} {min(found):>6.3f} {statistics.median(found):>7.3f}")


if __name__ == "__main__":
    main()
