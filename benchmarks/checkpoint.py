"""What a checkpoint costs, in steps of the same run: of a model of 64 and of 128 MiB, trained with Adam by two workers on this machine.

    python benchmarks/checkpoint.py [--mib 64 128] [--intervals 8] [--every 24]

Each run is a `disttrain run` with a checkpoint every `--every` steps. Worker 0 notes when it begins each step. What the steps of an
interval take beyond as many calm ones is what its checkpoint cost: the copy, and all that the thread that writes takes from the steps
beside it. A calm step is the median of the interval, most of whose steps run while nothing is saved. So steps with and without a save
alternate within one run, and whatever else the machine does hits both. Compare ratios, not times.

- cost: in steps, best and median over the intervals; the target is half a step
- longest: the longest step of an interval, in steps (median): what the loop waits for the copy is in it
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.utils.data import TensorDataset

WIDTH = 1024
LAYER_MIB = WIDTH * WIDTH * 4 >> 20
BATCH = 64
TARGET = 0.5
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
            file.write(f"{time.perf_counter()}\n")
    output: torch.Tensor = module(batch[0])
    return output.square().mean()


# The measurement.


def seconds_of_steps(folder: Path, strategy: str, *, mib: int, every: int, intervals: int) -> list[float]:
    """Runs a job; how long each step took, by worker 0."""
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
            "maxSteps": every * (intervals + 1) + every // 2 + 1,
        },
        "worker": {"replicas": 2},
        "checkpoint": {"volume": {"persistentVolumeClaim": "checkpoints"}, "everySteps": every, "keep": 1},
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
    moments = [float(line) for line in times.read_text().split()]
    return [after - before for before, after in itertools.pairwise(moments)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 128], help="sizes of the parameters")
    parser.add_argument("--intervals", type=int, default=8, help="checkpoints that are measured in a run")
    parser.add_argument("--every", type=int, default=24, help="steps between two checkpoints")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    options = parser.parse_args()
    print(
        f"{'strategy':<13} {'MiB':>4} {'step ms':>8} {'cost: best':>11} {'median':>7} {'longest':>8}   target: cost <= {TARGET}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for mib in options.mib:
            for strategy in options.strategies:
                seconds = seconds_of_steps(
                    Path(folder) / f"{strategy}-{mib}",
                    strategy,
                    mib=mib,
                    every=options.every,
                    intervals=options.intervals,
                )
                # The first interval warms up; the cuts lie in the calm half between two checkpoints.
                start, every = options.every // 2, options.every
                intervals = [seconds[at : at + every] for at in range(start, len(seconds) - every + 1, every)][1:]
                calm = [statistics.median(interval) for interval in intervals]
                costs = [(sum(one) - len(one) * step) / step for one, step in zip(intervals, calm, strict=True)]
                longest = statistics.median(max(one) / step for one, step in zip(intervals, calm, strict=True))
                print(
                    f"{strategy:<13} {mib:>4} {statistics.median(calm) * 1e3:>8.0f} {min(costs):>11.2f} "
                    f"{statistics.median(costs):>7.2f} {longest:>8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
