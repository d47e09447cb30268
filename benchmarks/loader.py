"""Samples that take time to load: samples/s of our loop with loader processes against a plain loop with torch's DataLoader.

    python benchmarks/loader.py [--rounds 3] [--steps 60] [--sample 0.002] [--loaders 2]

Each sample is a timed sleep, so that the ratio tells how much of the loading is hidden, and not how fast the machine is. Every loop runs in
a process of its own, with as many loader processes; ours are `disttrain run` with one worker. They take turns. Speed is that between the
beginning of step 10 and the end: what each has loaded before its first step does not count. Asked for is 0.9.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BATCH = 32
WARM_UP = 10
"""Steps that are not measured."""
USERS = """
import time
import torch
from torch import nn

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return {samples}

    def __getitem__(self, i):
        time.sleep({sample})
        return torch.full((8,), float(i)), torch.tensor([float(i % 2)])

def dataset(config, split):
    return Slow()

def model(config):
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

LOG = open("times", "a", buffering=1)

def loss(model, batch):
    LOG.write(f"{{time.time()}}\\n")
    x, y = batch
    found = nn.functional.mse_loss(torch.sigmoid(model(x)), y)
    LOG.write(f"{{time.time()}}\\n")
    return found
"""
PLAIN = """
import torch
from users import Slow, loss, model

net, steps = model({{}}), {steps}
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
loader = torch.utils.data.DataLoader(Slow(), batch_size={batch}, shuffle=True, num_workers={loaders}, persistent_workers={loaders} > 0)
while steps:
    for batch in loader:
        optimizer.zero_grad()
        loss(net, batch).backward()
        optimizer.step()
        steps -= 1
        if not steps:
            break
"""
SCRIPT = """
from disttrain_trainer import session
from users import Slow, loss, model

net = model({})
ps = session.parameter_server(net)
for batch in session.batches(Slow()):
    net.zero_grad()
    found = loss(net, batch)
    found.backward()
    ps.step(found)
"""
SERVED = {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}}
OURS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "DataParallel, no loader": ({"type": "DataParallel"}, False, False),
    "DataParallel": ({"type": "DataParallel"}, False, True),
    "Sync": (SERVED, False, True),
    "Async": ({"type": "ParameterServer", "parameterServer": {"consistency": "Async"}}, False, True),
    "Sync, session.batches": (SERVED, True, True),
}
"""By name: the strategy, whether a script has the loop, whether there are loader processes."""


def job_of(strategy: dict[str, Any], *, script: bool, steps: int, loaders: int) -> dict[str, Any]:
    work = {"script": {"file": "script.py"}} if script else {
        "model": "users:model", "dataset": "users:dataset", "loss": "users:loss"
    }  # fmt: skip
    optimizer = {"name": "SGD", "learningRate": 0.01}
    trainer = {**work, "optimizer": optimizer, "batchSize": BATCH, "maxSteps": steps, "loaderWorkers": loaders}
    spec: dict[str, Any] = {"strategy": strategy, "worker": {"replicas": 1}, "trainer": trainer}
    if "parameterServer" in strategy:
        spec["parameterServer"] = {"replicas": 1}
    kind = {"apiVersion": "disttrain.dev/v1alpha1", "kind": "DistTrainJob"}
    return {**kind, "metadata": {"name": "loader"}, "spec": spec}


def speed_of(command: list[str], folder: Path, steps: int) -> float:
    """Samples per second of a program that runs there."""
    (folder / "times").unlink(missing_ok=True)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    moments = [float(line) for line in (folder / "times").read_text().split()]
    return BATCH * (steps - WARM_UP) / (moments[-1] - moments[2 * WARM_UP])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sample", type=float, default=0.002, help="seconds of a sample")
    parser.add_argument("--loaders", type=int, default=2, help="loader processes")
    options = parser.parse_args()
    steps, loaders = options.steps, options.loaders
    plain = f"DataLoader({loaders})"
    speeds: dict[str, list[float]] = {name: [] for name in (plain, *OURS)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "users.py").write_text(USERS.format(samples=20 * BATCH, sample=options.sample))
        (folder / "plain.py").write_text(PLAIN.format(steps=steps, batch=BATCH, loaders=loaders))
        (folder / "script.py").write_text(SCRIPT)
        for _ in range(options.rounds):
            speeds[plain].append(speed_of([sys.executable, "plain.py"], folder, steps))
            for name, (strategy, script, loads) in OURS.items():
                job = job_of(strategy, script=script, steps=steps, loaders=loaders if loads else 0)
                (folder / "job.yaml").write_text(json.dumps(job))
                program = [str(Path(sys.executable).parent / "disttrain"), "run", "job.yaml"]
                speeds[name].append(speed_of(program, folder, steps))
    print(f"{'':24} samples/s  / {plain} at best  at the median")
    for name, found in speeds.items():
        best = max(found) / max(speeds[plain])
        median = statistics.median(ours / bare for ours, bare in zip(found, speeds[plain], strict=True))
        print(f"{name:24} {max(found):9.0f}  {best:22.2f}  {median:13.2f}")


if __name__ == "__main__":
    main()
