"""Workers join and leave while a job trains: its result does not depend on who was there when. `make soak` resizes a job thirty times."""

import random
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.processes import wait_for
from disttrain.api.names import MODEL_FILE, Role
from training.job import Job, checkpoints, digits, served
from width import WIDE

FEWEST, MOST = 2, 5
RESIZES = 30 if WIDE else 3
STEPS = 1500 if WIDE else 150
USERS = """
import os
import time
import torch
from torch import nn
from torch.utils.data import Dataset
from disttrain_trainer.examples import digits

SAMPLES = 240

class OneHot(Dataset):  # the gradient of a sample reaches a parameter of its own: in the end each tells how often it counted
    def __len__(self):
        return SAMPLES
    def __getitem__(self, i):
        return torch.nn.functional.one_hot(torch.tensor(i), SAMPLES).double()

def pace():
    time.sleep(0.3 if os.path.exists("slow") else 0.01)

def counted(config, split):
    return OneHot()

def counter(config):
    model = nn.Linear(SAMPLES, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model

def count(model, batch):
    pace()
    return model(batch).mean()

class Double(nn.Module):
    def forward(self, x):
        return x.double()

def model(config):
    return nn.Sequential(Double(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 10)).double()

def loss(model, batch):
    pace()
    return digits.loss(model, batch)
"""
WORKERS = {"worker": {"replicas": FEWEST, "elastic": {"minReplicas": FEWEST, "maxReplicas": MOST}}}
COLLECTIVE: dict[str, Any] = {"strategy": {"type": "DataParallel"}}


def sizes() -> list[int]:
    """The numbers of workers, one after the other; of the quick slice 5, 3, 4."""
    if not WIDE:
        return [5, 3, 4]
    chance, found = random.Random(12), [FEWEST]
    while len(found) <= RESIZES:
        found.append(chance.choice([size for size in range(FEWEST, MOST + 1) if size != found[-1]]))
    return found[1:]


def resize(job: Job, size: int) -> None:
    """What `disttrain scale` leads to: the processes with the highest indexes are asked to end, or new ones start.

    The training is slow meanwhile: a new process takes its time on a machine with much to do, and would find a job that is done.
    """
    slow = job.folder / "slow"
    slow.touch()
    now = [index for role, index in job.processes if role is Role.WORKER]
    for index in range(size):
        if index not in now:
            job.start_one(Role.WORKER, index)
    leavers = [index for index in now if index >= size]
    for index in leavers:
        job.kill(Role.WORKER, index, signal.SIGTERM)
    for index in leavers:
        assert job.wait(Role.WORKER, index) == 143, job.logs()
        del job.processes[Role.WORKER, index]
    job.until(lambda progress: progress.world_size == size or progress.finished)
    slow.unlink()


def trained(
    folder: Path, strategy: dict[str, Any], resizes: Iterable[int], trainer: dict[str, Any], *, steps: int = STEPS
) -> dict[str, torch.Tensor]:
    """The model of a job that is resized to these numbers of workers, at even distances."""
    folder.mkdir()
    (folder / "users.py").write_text(USERS)
    resizes = list(resizes)
    named = {"evaluate": None, "epochs": None, "maxSteps": steps} | trainer
    with Job(folder=folder, spec=digits(**strategy, **WORKERS, **checkpoints(40), trainer=named)) as job:
        for role, index in job.keys:
            if role is not Role.WORKER or index < FEWEST:
                job.start_one(role, index)
        for number, size in enumerate(resizes, start=1):
            at = number * steps // (len(resizes) + 2)
            job.until(lambda progress, at=at: progress.step >= at)
            resize(job, size)
            assert not job.progress().finished, "it ended before it was resized"
        assert job.complete(timeout=500 if WIDE else 100).redone_steps == 0
        assert not job.restarts
        return load_file(folder / "checkpoints" / MODEL_FILE)


@pytest.mark.timeout(600 if WIDE else 120)
@pytest.mark.parametrize(
    "strategy",
    [served("Sync"), served("Async", servers=1), COLLECTIVE],
    ids=["Sync", "Async", "DataParallel"],
)
def test_every_sample_counts_once_an_epoch_whoever_comes_and_goes(tmp_path: Path, strategy: dict[str, Any]) -> None:
    """240 samples in batches of 40: five parts of eight samples each."""
    trainer = {"model": "users:counter", "dataset": "users:counted", "loss": "users:count", "batchSize": 40}
    trainer["optimizer"] = {"name": "SGD", "learningRate": 1.0}
    model = trained(tmp_path / "job", strategy, sizes(), trainer)
    per_part = 1 / 8 if "Async" in str(strategy) else 1 / 40
    expected = torch.full((1, 240), -per_part * STEPS * 40 / 240, dtype=torch.float64)
    assert torch.allclose(model["weight"], expected, rtol=1e-12, atol=0)


@pytest.mark.timeout(1200 if WIDE else 120)
def test_a_synchronous_training_has_the_bits_of_one_that_was_never_resized(tmp_path: Path) -> None:
    trainer = {"model": "users:model", "loss": "users:loss", "deterministic": True}
    calm = trained(tmp_path / "calm", served("Sync"), [], trainer)
    resized = trained(tmp_path / "resized", served("Sync"), sizes(), trainer)
    assert calm.keys() == resized.keys()
    assert all(torch.equal(resized[name], tensor) for name, tensor in calm.items())


@pytest.mark.timeout(1200 if WIDE else 120)
def test_a_resized_training_with_collectives_agrees_within_rounding(tmp_path: Path) -> None:
    trainer = {"model": "users:model", "loss": "users:loss"}
    calm = trained(tmp_path / "calm", COLLECTIVE, [], trainer)
    resized = trained(tmp_path / "resized", COLLECTIVE, sizes(), trainer)
    assert calm.keys() == resized.keys()
    for name, tensor in calm.items():
        assert torch.allclose(resized[name], tensor, rtol=1e-12, atol=1e-12), name


SCRIPT = """
import os, signal, sys, time
names = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
rank, world, count = (os.environ[name] for name in names)
open(f"round-{count}.{rank}-of-{world}", "w").close()
while not os.path.exists("end"): time.sleep(0.02)
"""


def test_a_script_is_started_again_with_the_world_of_each_round(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    spec = digits(**COLLECTIVE, **WORKERS) | {"trainer": {"script": {"file": "train.py"}}}

    def runs(*ranks: str) -> None:
        wait_for(
            "the round",
            lambda: (
                {one.name for one in tmp_path.glob(f"round-{ranks[0][:1]}.*")} == {f"round-{rank}" for rank in ranks}
            ),
            30,
        )

    with Job(folder=tmp_path, spec=spec) as job:
        for role, index in job.keys:
            if role is not Role.WORKER or index < FEWEST:
                job.start_one(role, index)
        runs("0.0-of-2", "0.1-of-2")
        resize(job, 3)
        runs("1.0-of-3", "1.1-of-3", "1.2-of-3")
        resize(job, 2)
        runs("2.0-of-2", "2.1-of-2")
        (tmp_path / "end").touch()
        job.complete()


def test_below_the_fewest_a_training_waits_and_says_so_and_goes_on_with_a_worker_more(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(USERS)
    trainer = {"loss": "users:loss", "evaluate": None, "epochs": None, "maxSteps": 150}
    with Job(folder=tmp_path, spec=digits(**served("Sync", servers=1), **WORKERS, trainer=trainer)) as job:
        for role, index in [(Role.MASTER, 0), (Role.PARAMETER_SERVER, 0), (Role.WORKER, 0)]:
            job.start_one(role, index)
        waits = "1 more worker (ready: 1 of at least 2)"
        assert job.until(lambda progress: progress.waiting_for == waits).step == 0
        job.start_one(Role.WORKER, 4)
        job.until(lambda progress: progress.step >= 20)
        job.kill(Role.WORKER, 4)
        job.wait(Role.WORKER, 4)
        del job.processes[Role.WORKER, 4]
        step = job.until(lambda progress: progress.waiting_for == waits).step
        assert step < 150
        job.start_one(Role.WORKER, 2)
        assert job.complete().step == 150


@pytest.mark.timeout(240)
@pytest.mark.parametrize("strategy", [served("Sync"), COLLECTIVE], ids=["Sync", "DataParallel"])
def test_processes_that_are_killed_in_the_middle_of_a_resize_cost_no_sample(
    tmp_path: Path, strategy: dict[str, Any]
) -> None:
    """A new worker, one that leaves, one that stays, and the master: each by SIGKILL while others join or leave."""
    (tmp_path / "users.py").write_text(USERS)
    trainer = {"model": "users:counter", "dataset": "users:counted", "loss": "users:count", "batchSize": 40}
    trainer |= {"optimizer": {"name": "SGD", "learningRate": 1.0}, "evaluate": None, "epochs": None, "maxSteps": 210}
    with Job(folder=tmp_path, spec=digits(**strategy, **WORKERS, **checkpoints(40), trainer=trainer)) as job:

        def replace(role: Role, index: int) -> None:
            job.kill(role, index)
            job.wait(role, index)
            job.start_one(role, index)

        for role, index in job.keys:
            if role is not Role.WORKER or index < 3:
                job.start_one(role, index)
        job.until(lambda progress: progress.step >= 10)
        for index in (3, 4):
            job.start_one(Role.WORKER, index)
        replace(Role.WORKER, 3)
        replace(Role.WORKER, 0)
        job.until(lambda progress: progress.world_size == 5)
        job.kill(Role.WORKER, 4, signal.SIGTERM)
        job.kill(Role.WORKER, 3, signal.SIGTERM)
        job.kill(Role.WORKER, 3)
        replace(Role.MASTER, 0)
        for index in (3, 4):
            job.wait(Role.WORKER, index)
            del job.processes[Role.WORKER, index]
        job.until(lambda progress: progress.world_size == 3)
        job.start_one(Role.WORKER, 3)
        replace(Role.MASTER, 0)
        job.complete(timeout=100)
    model = load_file(tmp_path / "checkpoints" / MODEL_FILE)
    expected = torch.full((1, 240), -210 / 240, dtype=torch.float64)
    assert torch.allclose(model["weight"], expected, rtol=1e-12, atol=0)


def test_a_training_that_goes_on_without_rank_0_begins_from_its_checkpoint(tmp_path: Path) -> None:
    def spec(steps: int) -> dict[str, Any]:
        return digits(**COLLECTIVE, **WORKERS, **checkpoints(5), trainer={"epochs": None, "maxSteps": steps})

    def start(job: Job, *workers: int) -> Job:
        for role, index in job.keys:
            if role is not Role.WORKER or index in workers:
                job.start_one(role, index)
        return job

    with Job(folder=tmp_path, spec=spec(10)) as job:
        assert start(job, 0, 1).complete().step == 10
    with Job(folder=tmp_path, spec=spec(20), attempt=2) as job:
        progress = start(job, 1, 3).complete()
        assert "round 1 begins at step 10" in job.log(Role.WORKER, 1)
        assert "round 1 begins at step 10" in job.log(Role.WORKER, 3)
    assert progress.step == 20
    assert progress.last_checkpoint is not None
    assert progress.last_checkpoint.step == 20
