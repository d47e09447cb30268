"""What our loop costs beside a bare PyTorch loop: both on the same model and data, in turns, in one process.

    python benchmarks/loop.py            # a table; a ratio of 1.00 is a loop that costs nothing, above it is faster

The bare loop is what one would write by hand: tensors indexed by a permutation, zero_grad, loss, backward, step, with
torch.optim's defaults; and once more with its `fused=True`, which our loop uses. It neither looks at its loss, nor reports, nor can stop.
Ours is `loop/loop.py` with the exchange of a rank that is alone: metrics, reports, the check for NaN and a seed a step included.
"""

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from disttrain.api.names import Role
from disttrain.api.runtime import Addresses, JobConfig
from disttrain.api.spec import DistTrainJobSpec
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.all_reduce import AllReduce

BATCH = 64


def make_config(example: str, steps: int) -> JobConfig:
    """A job of one worker."""
    module = f"disttrain_trainer.examples.{example}"
    spec = DistTrainJobSpec.model_validate(
        {
            "strategy": {"type": "DataParallel"},
            "trainer": {
                "model": f"{module}:model",
                "dataset": f"{module}:dataset",
                "loss": f"{module}:loss",
                "optimizer": {"name": "SGD", "learningRate": 0.01, "momentum": 0.9},
                "batchSize": BATCH,
                "maxSteps": steps,
            },
        }
    )
    return JobConfig(
        namespace="benchmark",
        name=example,
        uid="none",
        attempt=1,
        strategy=spec.strategy,
        trainer=spec.trainer,
        workers=1,
        addresses=Addresses(control="127.0.0.1:9", rendezvous="127.0.0.1:9"),
    )


class Ours:
    """Our loop, a number of steps at a time. Its reports go to a connection that is never made."""

    def __init__(self, job: str | JobConfig, *, steps: int, rounds: int) -> None:
        """job: the name of an example, or a job of one worker."""
        config = make_config(job, steps * rounds) if isinstance(job, str) else job
        process = Process(config=config, role=Role.WORKER, index=0)
        self._rank = CollectiveMember()
        control = ControlClient(
            process=process, describe=self._rank.describe, on_message=self._rank.on_message, on_released=lambda: None
        )
        self._task = task = tasks.build(process.config, rank=0, local_rank=0, incarnation="")
        model, metrics = FlatModel(task.model), Metrics(process)
        self._loop = TrainingLoop(task, model, name="ours", metrics=metrics, send=lambda fields: None)
        self._rank.step, self._rank.round = 0, Round(1)
        self._steps = steps
        self._exchange = AllReduce(
            process=process,
            metrics=metrics,
            control=control,
            member=self._rank,
            this_round=self._rank.round,
            loop=self._loop,
            task=task,
            model=model,
            optimizer=FlatOptimizer(process.config.trainer.loop.optimizer, model),
            replica=None,
            reshare=lambda: None,
            checkpoints=None,
        )

    def run(self) -> None:
        self._task.schedule.total_steps = self._rank.step + self._steps
        self._loop.run(self._exchange)


class Bare:
    """The loop without us."""

    def __init__(self, example: str, *, steps: int, fused: bool) -> None:
        task = tasks.build(make_config(example, steps), rank=0, local_rank=0, incarnation="")
        self._model, self._loss, self._steps = task.model, task.loss, steps
        dataset: Any = __import__(f"disttrain_trainer.examples.{example}", fromlist=["dataset"]).dataset({}, "train")
        self._tensors = dataset.tensors
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01, momentum=0.9, fused=fused)
        self._order = torch.randperm(len(dataset))
        self._at = 0

    def run(self) -> None:
        for _ in range(self._steps):
            if self._at >= len(self._order):
                self._order, self._at = torch.randperm(len(self._order)), 0
            indices = self._order[self._at : self._at + BATCH]
            self._at += BATCH
            batch = [tensor[indices] for tensor in self._tensors]
            self._optimizer.zero_grad()
            loss = self._loss(self._model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()


def measure(example: str, *, steps: int, rounds: int) -> list[tuple[str, float, float, float]]:
    """For each bare loop: its name, milliseconds of one of its steps at best, and bare/ours at best and at the median."""
    loops = {
        "ours": Ours(example, steps=steps, rounds=rounds + 1),
        "torch.optim, as is": Bare(example, steps=steps, fused=False),
        "torch.optim, fused": Bare(example, steps=steps, fused=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop.run()
    for _ in range(rounds):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop.run()
            seconds[name].append((time.perf_counter() - began) / steps)
    ours = seconds.pop("ours")
    return [
        (
            name,
            min(bare) * 1e3,
            min(bare) / min(ours),
            statistics.median(b / o for b, o in zip(bare, ours, strict=True)),
        )
        for name, bare in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each loop")
    options = parser.parse_args()
    print(
        f"{'model':<8} {'bare loop':<20} {'bare ms/step':>12} {'best':>6} {'median':>7}   speed of ours / bare; target 0.95"
    )
    for example, steps in (("digits", 200), ("charlm", 5)):
        for name, milliseconds, best, median in measure(example, steps=steps, rounds=options.rounds):
            print(f"{example:<8} {name:<20} {milliseconds:>12.3f} {best:>6.2f} {median:>7.2f}")


if __name__ == "__main__":
    main()
