"""Uneven work: samples/s of Sync, of Sync with backup workers and of BoundedStaleness, against DDP; the slowness is a timed sleep.

    python benchmarks/uneven_work.py [--rounds 3] [--steps 60] [--parts 48] [--part 0.02] [--mode uneven]

Four workers, 48 parts a step (DDP adds up those of a rank, and exchanges once). A part takes as long as its sequences are, 0.5 to 1.5 of
the mean. Besides, one worker is 1.5x slower, another one each half second ("uneven"), or each part is delayed by five part-times with a
probability of 5 % ("delays"). Each job is a `disttrain run` with one server; they take turns. Speed is that between the beginning of step 5
and the end, the time of a step that between the beginnings of two neighbours. Compare ratios, not times.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

WORKERS, BATCH = 4, 96
WARM_UP = 5
"""Steps that are not measured."""
SLOW = """
import hashlib, os, time
import torch
from disttrain_trainer.examples import digits
from disttrain_trainer.data.chance import mix

PART, STEPS, PARTS, WORKERS, MODE = {part}, {steps}, {parts}, {workers}, "{mode}"
NUMBER = {{mix(0, number): number for number in range(STEPS * PARTS)}}
INDEX = int(os.environ["DISTTRAIN_INDEX"])
LOG = open(f"times-{{INDEX}}", "w", buffering=1)

def chance(*of):
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:4]) / 2**32

def loss(model, batch):
    number = NUMBER[torch.initial_seed() & ((1 << 64) - 1)]
    LOG.write(f"{{number // PARTS}} {{time.time()}}\\n")
    seconds = PART * (0.5 + chance("length", number))
    if MODE == "uneven":
        slow = int(chance("slow", int(time.time() / 0.5)) * WORKERS) == INDEX
        seconds *= 1.5 if slow else 1.0
    elif chance("delay", number, INDEX) < 0.05:
        seconds += 5 * PART
    time.sleep(seconds)
    LOG.write(f"{{number // PARTS}} {{time.time()}}\\n")
    return digits.loss(model, batch)
"""
STRATEGIES: dict[str, dict[str, Any]] = {
    "DDP": {"type": "DataParallel"},
    "Sync": {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}},
    "Sync, backupWorkers 3": {
        "type": "ParameterServer",
        "parameterServer": {"consistency": "Sync", "backupWorkers": 3},
    },
    "BoundedStaleness 48": {
        "type": "ParameterServer",
        "parameterServer": {"consistency": "BoundedStaleness", "maxStaleness": 48},
    },
}


def job_of(strategy: dict[str, Any], steps: int, parts: int) -> dict[str, Any]:
    module = "disttrain_trainer.examples.digits"
    spec: dict[str, Any] = {
        "strategy": strategy,
        "worker": {"replicas": WORKERS},
        "trainer": {
            "model": f"{module}:model",
            "dataset": f"{module}:dataset",
            "loss": "slow:loss",
            "optimizer": {"name": "SGD", "learningRate": 0.01},
            "batchSize": BATCH,
            "maxSteps": steps,
            "partsPerStep": parts,
        },
    }
    if "parameterServer" in strategy:
        spec["parameterServer"] = {"replicas": 1}
    return {
        "apiVersion": "disttrain.dev/v1alpha1",
        "kind": "DistTrainJob",
        "metadata": {"name": "uneven"},
        "spec": spec,
    }


def run(strategy: dict[str, Any], mode: str, *, steps: int, parts: int, part: float) -> tuple[float, list[float]]:
    """Samples per second, and the seconds of each step."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = SLOW.format(part=part, steps=steps, parts=parts, workers=WORKERS, mode=mode)
        (folder / "slow.py").write_text(text)
        (folder / "job.yaml").write_text(json.dumps(job_of(strategy, steps, parts)))
        command = [str(Path(sys.executable).parent / "disttrain"), "run", "job.yaml"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=600)
        lines = [line.split() for file in folder.glob("times-*") for line in file.read_text().splitlines()]
    begins: dict[int, float] = {}
    for step, moment in ((int(step), float(moment)) for step, moment in lines):
        begins[step] = min(moment, begins.get(step, moment))
    ordered = [begins[step] for step in sorted(begins) if step >= WARM_UP]
    end = max(float(moment) for _, moment in lines)
    return BATCH * (steps - WARM_UP) / (end - ordered[0]), [after - before for before, after in pairwise(ordered)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--part", type=float, default=0.02, help="mean seconds of a part")
    parser.add_argument("--parts", type=int, default=48, help="of a step")
    parser.add_argument("--mode", choices=("uneven", "delays"), action="append")
    options = parser.parse_args()
    for mode in options.mode or ("uneven", "delays"):
        speeds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
        tails: dict[str, list[float]] = {name: [] for name in STRATEGIES}
        for _ in range(options.rounds):
            for name, strategy in STRATEGIES.items():
                speed, seconds = run(strategy, mode, steps=options.steps, parts=options.parts, part=options.part)
                speeds[name].append(speed)
                tails[name] += seconds
        print(f"{mode:24} samples/s  / DDP best  median  p99 / median step")
        for name, found in speeds.items():
            best = max(found) / max(speeds["DDP"])
            median = statistics.median(found) / statistics.median(speeds["DDP"])
            tail = sorted(tails[name])[int(0.99 * len(tails[name]))] / statistics.median(tails[name])
            print(f"{name:24} {max(found):9.0f}  {best:10.2f}  {median:6.2f}  {tail:10.2f}")


if __name__ == "__main__":
    main()
