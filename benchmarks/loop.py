"""What our loop costs beside a bare PyTorch loop: both on the same model and data, in turns, in one process.

    python benchmarks/loop.py            # a table; a ratio of 1.00 is a loop that costs nothing, above it is faster

The bare loop is what one would write by hand: tensors indexed by a permutation, zero_grad, loss, backward, step, with
torch.optim's defaults; and once more with its `fused=True`, which our loop uses. It neither looks at its loss, nor reports, nor can stop.
Ours is `loop/loop.py` with the exchange of a rank that is alone: metrics, reports, the check for NaN and a seed a step included; for
the MLP also with the exchange of one worker of one and of two parameter servers, which are processes of this machine.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, Protocol

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
from disttrain_trainer.net.members import CollectiveMember, ParameterServerMember, Round
from disttrain_trainer.parameter_server import ShardedClient, ShardServer
from disttrain_trainer.parameter_server.assignments import Assignments
from disttrain_trainer.parameter_server.replica import Replica
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.all_reduce import AllReduce
from disttrain_trainer.strategies.push_pull import PushPull

BATCH = 64
FORKS = multiprocessing.get_context("forkserver")  # torch is imported once for all servers
FORKS.set_forkserver_preload(["disttrain_trainer.parameter_server"])


class Looping(Protocol):
    """A loop that is measured."""

    def run(self) -> None:
        """So many steps."""


def make_config(example: str, steps: int, *, batch: int = BATCH, servers: int = 0) -> JobConfig:
    """A job of one worker."""
    module = f"disttrain_trainer.examples.{example}"
    served = {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}}
    spec = DistTrainJobSpec.model_validate(
        {
            "strategy": served if servers else {"type": "DataParallel"},
            "trainer": {
                "model": f"{module}:model",
                "dataset": f"{module}:dataset",
                "loss": f"{module}:loss",
                "optimizer": {"name": "SGD", "learningRate": 0.01, "momentum": 0.9},
                "batchSize": batch,
                "maxSteps": steps,
            },
            **({"parameterServer": {"replicas": servers}} if servers else {}),
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
        parameter_servers=servers,
        addresses=Addresses(control="127.0.0.1:9", rendezvous="127.0.0.1:9"),
    )


class Ours:
    """Our loop, a number of steps at a time. Its reports go to a connection that is never made."""

    def __init__(self, job: str | JobConfig, *, steps: int, rounds: int, batch: int = BATCH) -> None:
        """job: the name of an example, or a job of one worker."""
        config = make_config(job, steps * rounds, batch=batch) if isinstance(job, str) else job
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


class Given(Assignments):
    """Parts that are assigned from the beginning; the round is over when they are computed."""

    def __init__(self, control: ControlClient, member: ParameterServerMember) -> None:
        super().__init__(control, member)
        self._parts = member.assignments

    @property
    def is_over(self) -> bool:
        return not self._parts


class Served:
    """Our loop with parameter servers, as `Ours`."""

    def __init__(self, example: str, *, steps: int, rounds: int, servers: int, batch: int, until: ExitStack) -> None:
        """until: ends the servers."""
        config = make_config(example, steps * rounds, batch=batch, servers=servers)
        process = Process(config=config, role=Role.WORKER, index=0)
        self._member = member = ParameterServerMember()
        control = ControlClient(
            process=process, describe=member.describe, on_message=member.on_message, on_released=lambda: None
        )
        task = tasks.build(config, rank=0, local_rank=0, incarnation="")
        metrics, replica = Metrics(process), Replica(process, task, is_sync=True)
        self._loop = TrainingLoop(task, replica.model, name="served", metrics=metrics, send=lambda fields: None)
        self._numbers, self._steps = iter(range(steps * rounds)), steps
        addresses = [until.enter_context(_Server(config, index)).address for index in range(servers)]
        client = ShardedClient(
            addresses=addresses, config=config, rank=0, incarnation="worker", round_number=1, timeout=30
        )
        client.connect(replica.model.layout)
        member.asked = True  # the master is not there
        member.round = Round(1, from_scratch=True)
        replica.begin(client, member.round)
        assignments = Given(control, member)
        self._exchange = PushPull(
            control=control,
            member=member,
            metrics=metrics,
            assignments=assignments,
            client=client,
            loop=self._loop,
            schedule=task.schedule,
            replica=replica,
            is_sync=True,
            every=0,
            save=lambda: None,
            evaluate=lambda: None,
            on_part=lambda: None,
        )

    def run(self) -> None:
        self._member.assignments.extend(next(self._numbers) for _ in range(self._steps))
        self._loop.run(self._exchange)


class _Server:
    """A process with a parameter server."""

    def __init__(self, config: JobConfig, index: int) -> None:
        self._here, there = FORKS.Pipe()
        self._process = FORKS.Process(target=_serve, args=(config.encode(), index, there), daemon=True)
        self._process.start()
        self.address: str = self._here.recv()

    def __enter__(self) -> "_Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._here.send("")
        self._process.join()


def _serve(text: str, index: int, control: Connection) -> None:
    config, _ = JobConfig.decode(text)
    server = ShardServer(config=config, index=index, host="127.0.0.1", port=0)
    server.start()
    server.begin(1, None)
    control.send(server.address)
    control.recv()


class Bare:
    """The loop without us."""

    def __init__(self, example: str, *, steps: int, fused: bool, batch: int = BATCH) -> None:
        task = tasks.build(make_config(example, steps, batch=batch), rank=0, local_rank=0, incarnation="")
        self._model, self._loss, self._steps = task.model, task.loss, steps
        dataset: Any = __import__(f"disttrain_trainer.examples.{example}", fromlist=["dataset"]).dataset({}, "train")
        self._tensors = dataset.tensors
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01, momentum=0.9, fused=fused)
        self._order = torch.randperm(len(dataset))
        self._at, self._batch = 0, batch

    def run(self) -> None:
        for _ in range(self._steps):
            if self._at >= len(self._order):
                self._order, self._at = torch.randperm(len(self._order)), 0
            indices = self._order[self._at : self._at + self._batch]
            self._at += self._batch
            batch = [tensor[indices] for tensor in self._tensors]
            self._optimizer.zero_grad()
            loss = self._loss(self._model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()


Times = dict[str, list[tuple[float, float]]]
"""By loop: of each turn wall and processor seconds of a step, the processor's of this process alone."""


def in_turns(loops: dict[str, Looping], *, steps: int, rounds: int) -> Times:
    """Runs each loop once before, and then `rounds` times in turns."""
    times: Times = {name: [] for name in loops}
    for loop in loops.values():
        loop.run()
    for _ in range(rounds):
        for name, loop in loops.items():
            began = time.perf_counter(), time.process_time()
            loop.run()
            ended = time.perf_counter(), time.process_time()
            times[name].append(((ended[0] - began[0]) / steps, (ended[1] - began[1]) / steps))
    return times


def measure(example: str, *, steps: int, rounds: int) -> list[tuple[str, float, float, float]]:
    """For each bare loop: its name, milliseconds of one of its steps at best, and bare/ours at best and at the median."""
    loops: dict[str, Looping] = {
        "ours": Ours(example, steps=steps, rounds=rounds + 1),
        "torch.optim, as is": Bare(example, steps=steps, fused=False),
        "torch.optim, fused": Bare(example, steps=steps, fused=True),
    }
    times = in_turns(loops, steps=steps, rounds=rounds)
    ours = times.pop("ours")
    return [(name, *_compared(bare, ours, 0)) for name, bare in times.items()]


def measure_small(*, batch: int, steps: int, rounds: int) -> list[tuple[str, tuple[float, float, float], float]]:
    """The MLP alone, and through one and two servers, beside a bare loop with torch.optim as is: name; milliseconds of a bare step at best,
    bare/ours at best and at the median; and bare/ours of the processor time of this process."""
    with ExitStack() as until:
        makers: dict[str, Callable[[], Looping]] = {
            "bare": lambda: Bare("mlp", steps=steps, fused=False, batch=batch),
            "alone": lambda: Ours("mlp", steps=steps, rounds=rounds + 1, batch=batch),
            **{
                f"{count} server{'s' * (count > 1)}": lambda count=count: Served(
                    "mlp", steps=steps, rounds=rounds + 1, servers=count, batch=batch, until=until
                )
                for count in (1, 2)
            },
        }
        times = in_turns({name: make() for name, make in makers.items()}, steps=steps, rounds=rounds)
    bare = times.pop("bare")
    return [(name, _compared(bare, ours, 0), _compared(bare, ours, 1)[2]) for name, ours in times.items()]


def _compared(
    bare: list[tuple[float, float]], ours: list[tuple[float, float]], kind: int
) -> tuple[float, float, float]:
    one, other = [turn[kind] for turn in bare], [turn[kind] for turn in ours]
    return min(one) * 1e3, min(one) / min(other), statistics.median(b / o for b, o in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=300, help="of a turn of the MLP")
    parser.add_argument("--only", choices=("mlp", "large"), help="mlp: the small model alone; large: the two others")
    options = parser.parse_args()
    if options.only != "large":
        print(f"{'10-20-10 MLP':<26} {'bare ms/step':>12} {'best':>6} {'median':>7} {'processor':>10}")
        for batch in (2, BATCH, 512):
            for name, (milliseconds, best, median), processor in measure_small(
                batch=batch, steps=options.steps, rounds=options.rounds
            ):
                print(
                    f"batch {batch:<5} {name:<14} {milliseconds:>12.3f} {best:>6.2f} {median:>7.2f} {processor:>10.2f}"
                )
    if options.only == "mlp":
        return
    print(
        f"{'model':<8} {'bare loop':<20} {'bare ms/step':>12} {'best':>6} {'median':>7}   speed of ours / bare; target 0.95"
    )
    for example, steps in (("digits", 200), ("charlm", 5)):
        for name, milliseconds, best, median in measure(example, steps=steps, rounds=options.rounds):
            print(f"{example:<8} {name:<20} {milliseconds:>12.3f} {best:>6.2f} {median:>7.2f}")


if __name__ == "__main__":
    main()
