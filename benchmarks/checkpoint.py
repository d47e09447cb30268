"""What a checkpoint costs, in steps of the same run: of a model of 64 and of 128 MiB, trained with Adam by two workers on this machine.

    python benchmarks/checkpoint.py [--mib 64 128] [--intervals 8] [--every 24]

Each run is a `disttrain run` with a checkpoint every `--every` steps. Worker 0 notes when it begins each step, and the manifests say when
each checkpoint was committed. The steps of an interval that begin later are calm. What those from the copy to the commit take beyond as
many calm ones (the median) is what the checkpoint cost: the copy, and all that the thread that writes takes from the steps beside it. So
steps with and without a save alternate within one run, and whatever else the machine does hits both. Compare ratios, not times.

- cost: in steps, best and median over the checkpoints but the first, which also gets its memory; the target is half a step
- cpu: the same in the processor's time of all processes of the run (median): other work on the machine, and where the scheduler puts ours,
  hardly change it. What the kernel does elsewhere for the disk is not in it
- longest: the longest step beside a save, in steps (median): what the loop waits for the copy is in it
- saved in: seconds until the commit (median)
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.utils.data import TensorDataset

WIDTH = 1024
LAYER_MIB = WIDTH * WIDTH * 4 >> 20
BATCH = 64
TARGET = 0.5
CALM = 2
"""Calm steps that an interval must have to be counted."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "DataParallel": {"strategy": {"type": "DataParallel"}},
    **{
        consistency: {
            "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": consistency}},
            "parameterServer": {"replicas": 2},
        }
        for consistency in ("Sync", "Async")
    },
}


# What the workers of a run import.


def model(config: dict[str, Any]) -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(int(config["layers"]))))


def dataset(config: dict[str, Any], split: str) -> TensorDataset:
    return TensorDataset(torch.randn(4 * BATCH, WIDTH))


def loss(module: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    if os.environ["RANK"] == "0":
        with Path(os.environ["BENCHMARK_TIMES"]).open("a") as file:
            file.write(f"{time.time()} {cpu_seconds()}\n")
    output: torch.Tensor = module(batch[0])
    return output.square().mean()


def cpu_seconds() -> float:
    """Of all processes of this run since they began."""
    ticks = 0
    for stat in processes():
        fields = stat.read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


@functools.cache
def processes() -> list[Path]:
    """Where the kernel counts for each of them: those that have the variable of this run. All are there when the first step begins."""
    own = f"BENCHMARK_TIMES={os.environ['BENCHMARK_TIMES']}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if own in environ.read_bytes().split(b"\0"):
                found.append(environ.with_name("stat"))
    return found


# The measurement.


class Cost(NamedTuple):
    """Of one checkpoint, in calm steps of its interval."""

    step: float
    """Seconds of one."""
    taken: float
    cpu: float
    longest: float
    saved_in: float
    """Seconds."""


def run(
    folder: Path, strategy: str, *, mib: int, every: int, intervals: int
) -> tuple[list[tuple[float, float]], dict[int, float]]:
    """Runs a job; when worker 0 began each step, with the processor's time until then, and when the checkpoint of a step was committed."""
    folder.mkdir()
    times = folder / "times"
    spec = STRATEGIES[strategy] | {
        "trainer": {
            "model": "checkpoint:model",
            "dataset": "checkpoint:dataset",
            "loss": "checkpoint:loss",
            "config": {"layers": str(max(1, mib // LAYER_MIB))},
            "optimizer": {"name": "Adam", "learningRate": 1e-6},
            "batchSize": BATCH,
            "maxSteps": every * (intervals + 2),
        },
        "worker": {"replicas": 2},
        "checkpoint": {
            "volume": {"persistentVolumeClaim": "claim"},
            "everySteps": every,
            "keep": intervals + 2,
        },
    }
    job = {
        "apiVersion": "disttrain.dev/v1alpha1",
        "kind": "DistTrainJob",
        "metadata": {"name": "benchmark"},
        "spec": spec,
    }
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "BENCHMARK_TIMES": str(times)}
    command = [str(Path(sys.executable).with_name("disttrain")), "run", "-q", str(file)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    manifests = [json.loads(path.read_text()) for path in folder.glob(".disttrain/claims/claim/*/step-*/manifest.json")]
    committed = {m["step"]: datetime.fromisoformat(m["time"]).timestamp() for m in manifests if not m["finished"]}
    noted = [tuple(map(float, line.split())) for line in times.read_text().splitlines()]
    return [(begun, cpu) for begun, cpu in noted], dict(sorted(committed.items()))


def costs(noted: list[tuple[float, float]], committed: dict[int, float]) -> Iterator[Cost]:
    """Of each checkpoint but the first."""
    begun, until = zip(*noted, strict=True)
    seconds, cpu = ([after - before for before, after in itertools.pairwise(times)] for times in (begun, until))
    # The copy is made at the end of a step; Async begins it a part earlier or later.
    copied = [max(0, step - 2) for step in committed]
    for start, stop, moment in list(zip(copied, [*copied[1:], len(seconds)], committed.values(), strict=True))[1:]:
        beside = [number for number in range(start, stop) if begun[number] < moment]
        calm = range(start + len(beside), stop)
        if len(calm) >= CALM:
            step = statistics.median(seconds[number] for number in calm)
            calm_cpu = statistics.fmean(cpu[number] for number in calm)  # the kernel counts in steps of 10 ms
            taken = [seconds[number] for number in beside]
            yield Cost(
                step=step,
                taken=sum(taken) / step - len(taken),
                cpu=sum(cpu[number] for number in beside) / calm_cpu - len(beside),
                longest=max(taken) / step,
                saved_in=moment - begun[start + 1],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 128], help="sizes of the parameters")
    parser.add_argument("--intervals", type=int, default=8, help="checkpoints that are measured in a run")
    parser.add_argument("--every", type=int, default=24, help="steps between two checkpoints")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    options = parser.parse_args()
    print(
        f"{'strategy':<13} {'MiB':>4} {'step ms':>8} {'cost: best':>11} {'median':>7} {'cpu':>6} {'longest':>8} {'saved in s':>11}"
        f"   target: cost <= {TARGET}"
    )
    for mib, strategy in itertools.product(options.mib, options.strategies):
        with tempfile.TemporaryDirectory() as folder:
            measured = list(
                costs(*run(Path(folder) / "run", strategy, mib=mib, every=options.every, intervals=options.intervals))
            )
        if not measured:
            raise SystemExit(f"{strategy}: every save took its whole interval; raise --every")
        best = min(cost.taken for cost in measured)
        middle = Cost(*map(statistics.median, zip(*measured, strict=True)))
        print(
            f"{strategy:<13} {mib:>4} {middle.step * 1e3:>8.0f} {best:>11.2f} {middle.taken:>7.2f} {middle.cpu:>6.2f} "
            f"{middle.longest:>8.2f} {middle.saved_in:>11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
