"""backupWorkers: a slow worker's parts are computed by the others, too; the model has the bits of a calm run, and each part counts once."""

import signal
from pathlib import Path
from typing import Any

from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, same

STEPS, PARTS, WORKERS = 20, 6, 3
SLOW = """
import os, time
from disttrain_trainer.examples import digits
SLEEP = {"1": float(os.environ["SLOW"])}.get(os.environ["DISTTRAIN_INDEX"], 0.01)

def loss(model, batch):
    with open("computed-" + os.environ["DISTTRAIN_INDEX"], "a") as file:
        file.write("part\\n")
    time.sleep(SLEEP)
    return digits.loss(model, batch)
"""
NORMED = """
from torch import nn

def model(config):
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
"""


def spec(backups: int, **policy: object) -> dict[str, Any]:
    return digits(
        strategy={
            "type": "ParameterServer",
            "parameterServer": {"consistency": "Sync", "backupWorkers": backups, **policy},
        },
        parameterServer={"replicas": 2},
        worker={"replicas": WORKERS},
        trainer={
            "model": "normed:model", "loss": "slow:loss", "evaluate": None,
            "epochs": None, "maxSteps": STEPS, "partsPerStep": PARTS,
        },
        **checkpoints(1000),
    )  # fmt: skip


def ready(folder: Path, *, slow: float, **policy: Any) -> Job:
    """A job whose worker 1 sleeps so many seconds in each part; the others sleep 10 ms."""
    folder.mkdir()
    (folder / "slow.py").write_text(SLOW)
    (folder / "normed.py").write_text(NORMED)
    return Job(folder=folder, spec=spec(**policy), env={"SLOW": str(slow)}, peer_timeout=100)


def computed(job: Job, worker: int) -> int:
    """Parts that a worker has begun to compute."""
    return len((job.folder / f"computed-{worker}").read_text().splitlines())


def test_others_compute_the_parts_of_a_slow_worker_and_no_bit_changes(tmp_path: Path) -> None:
    with ready(tmp_path / "calm", slow=0.01, backups=0) as calm:
        assert calm.train().step == STEPS
    with ready(tmp_path / "hedged", slow=0.15, backups=2) as hedged:
        assert hedged.train().step == STEPS
    assert same(calm.model, hedged.model)
    assert sum(computed(calm, worker) for worker in range(WORKERS)) == STEPS * PARTS
    assert sum(computed(hedged, worker) for worker in range(WORKERS)) >= STEPS * PARTS
    assert computed(hedged, 1) < 0.75 * STEPS * PARTS / WORKERS, "its second part of each step is another worker's"


def test_a_lost_worker_and_a_lost_server_with_a_copy_change_no_bit_of_a_hedged_training(tmp_path: Path) -> None:
    with ready(tmp_path / "calm", slow=0.01, backups=0) as calm:
        calm.train()
    with ready(tmp_path / "hit", slow=0.06, backups=2, replication=2) as hit:
        hit.start()
        hit.until(lambda progress: progress.step >= 2)
        hit.kill(Role.WORKER, 1)
        hit.until(lambda progress: progress.step >= 6, tolerate=True)
        hit.kill(Role.PARAMETER_SERVER, 1)
        hit.complete()
    assert hit.restarts == {(Role.WORKER, 1): 1, (Role.PARAMETER_SERVER, 1): 1}
    assert same(calm.model, hit.model)


def test_a_frozen_worker_holds_up_no_step_although_it_is_not_declared_lost(tmp_path: Path) -> None:
    with ready(tmp_path / "frozen", slow=0.01, backups=2) as job:
        job.start()
        job.until(lambda progress: progress.step >= 1)
        job.kill(Role.WORKER, 1, signal.SIGSTOP)
        job.until(lambda progress: progress.step == STEPS)
        job.kill(Role.WORKER, 1, signal.SIGCONT)
        job.complete()
        assert not job.restarts
