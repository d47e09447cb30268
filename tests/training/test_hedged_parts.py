"""backupWorkers: a slow worker's parts are computed by the others, too; the model has the bits of a calm run, and each part counts once."""

import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from disttrain.api.names import Role
from training.job import Job, checkpoints, digits

STEPS, PARTS, WORKERS = 20, 6, 3
SLOW = """
import os, time
from disttrain_trainer.examples import digits
SLEEP = {"1": float(os.environ["SLOW"])}.get(os.environ["DISTTRAIN_INDEX"], 0.01)

def loss(model, batch):
    time.sleep(SLEEP)
    return digits.loss(model, batch)
"""
NORMED = """
from torch import nn

def model(config):
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
"""


def spec(backups: int) -> dict[str, Any]:
    return digits(
        strategy={"type": "ParameterServer", "parameterServer": {"consistency": "Sync", "backupWorkers": backups}},
        parameterServer={"replicas": 2},
        worker={"replicas": WORKERS},
        trainer={
            "model": "normed:model", "loss": "slow:loss", "evaluate": None,
            "epochs": None, "maxSteps": STEPS, "partsPerStep": PARTS,
        },
        **checkpoints(1000),
    )  # fmt: skip


def train(
    folder: Path, *, backups: int, slow: float, kill: bool = False
) -> tuple[dict[str, torch.Tensor], float, dict[Any, int]]:
    """The trained model, the seconds that it took, and the restarts. slow: seconds that worker 1 sleeps in each part; the others 10 ms."""
    folder.mkdir()
    (folder / "slow.py").write_text(SLOW)
    (folder / "normed.py").write_text(NORMED)
    with Job(folder=folder, spec=spec(backups), env={"SLOW": str(slow)}) as job:
        job.start()
        job.until(lambda progress: progress.step >= 1)
        began = time.monotonic()
        if kill:
            job.kill(Role.WORKER, 1, signal.SIGKILL)
        progress = job.complete()
        seconds = time.monotonic() - began
        assert progress.step == STEPS
    return load_file(folder / "checkpoints" / "model.safetensors"), seconds, job.restarts


def test_a_slow_worker_changes_no_bit_and_costs_less_where_others_hedge_its_parts(tmp_path: Path) -> None:
    calm, _, _ = train(tmp_path / "calm", backups=0, slow=0.01)
    plain, without, _ = train(tmp_path / "plain", backups=0, slow=0.06)
    hedged, seconds, _ = train(tmp_path / "hedged", backups=2, slow=0.06)
    killed, _, restarts = train(tmp_path / "killed", backups=2, slow=0.06, kill=True)
    assert restarts == {(Role.WORKER, 1): 1}
    for other in (plain, hedged, killed):
        assert calm.keys() == other.keys()
        assert all(torch.equal(calm[name], other[name]) for name in calm)
    assert seconds < 0.8 * without, f"{seconds:.2f} s with hedges, {without:.2f} s without"


def test_a_frozen_worker_holds_up_no_step_although_it_is_not_declared_lost(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "normed.py").write_text(NORMED)
    with Job(folder=tmp_path, spec=spec(2), env={"SLOW": "0.01"}, peer_timeout=100) as job:
        job.start()
        job.until(lambda progress: progress.step >= 1)
        job.kill(Role.WORKER, 1, signal.SIGSTOP)
        job.until(lambda progress: progress.step == STEPS)
        job.kill(Role.WORKER, 1, signal.SIGCONT)
        job.complete()
        assert not job.restarts
