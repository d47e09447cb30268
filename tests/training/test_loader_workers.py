"""Whole jobs whose batches other processes load: every sample once an epoch, with the same augmentation, whoever computes and is killed."""

import os
import random
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.processes import wait_for
from disttrain.api.names import MODEL_FILE, Role
from disttrain_trainer.data.chance import SampleSeeds
from disttrain_trainer.data.order import KeyedPermutation
from training.job import Job, checkpoints, digits, served

SAMPLES, BATCH, EPOCHS = 256, 32, 3
USERS = f"""
import random, threading
import numpy as np
import torch
from torch import nn
import held_loss

class Drawing(torch.utils.data.Dataset):
    def __init__(self):
        self.lock = threading.Lock()  # pickle cannot take it

    def __len__(self):
        return {SAMPLES}

    def __getitem__(self, i):
        with self.lock:
            drawn = [np.random.random(), random.random(), torch.rand((), dtype=torch.float64).item()]
        return i, torch.tensor(drawn, dtype=torch.float64)

def dataset(config, split):
    return Drawing()

class Broken(Drawing):
    def __getitem__(self, i):
        if i == 7:
            raise ValueError("sample 7 is broken")
        return super().__getitem__(i)

def broken(config, split):
    return Broken()

class Counts(nn.Module):
    # By SGD with the learning rate {BATCH}: how often each sample was applied, and the sum of what it drew.
    def __init__(self):
        super().__init__()
        self.times = nn.Parameter(torch.zeros({SAMPLES}, dtype=torch.float64))
        self.drawn = nn.Parameter(torch.zeros({SAMPLES}, 3, dtype=torch.float64))
        self.chance = nn.Parameter(torch.zeros({SAMPLES}, dtype=torch.float64))

    def forward(self, ids, drawn, own):
        return self.times[ids] + (self.drawn[ids] * drawn).sum(1) + self.chance[ids] * own

def model(config):
    return Counts()

class Counting:
    @staticmethod
    def loss(model, batch):
        ids, drawn = batch
        # What the loss itself draws does not depend on who loaded the batch, nor on what that drew.
        own = (torch.rand(len(ids), dtype=torch.float64) + torch.from_numpy(np.random.random(len(ids)))).to(ids.device)
        return -model(ids, drawn, own).mean()

held_loss.digits = Counting
loss = held_loss.loss
"""


SCRIPT = """
import numpy as np
import torch
from disttrain_trainer import session
import users

model = users.Counts()
ps = session.parameter_server(model)
for ids, drawn in session.batches(users.Drawing()):
    model.zero_grad()
    loss = -model(ids, drawn, torch.zeros(len(ids))).mean()
    loss.backward()
    ps.step(loss)
"""


def spec(folder: Path, changes: dict[str, Any], loaders: int, **trainer: Any) -> dict[str, Any]:
    (folder / "users.py").write_text(USERS)
    (folder / "script.py").write_text(SCRIPT)
    ours = {
        "model": "users:model",
        "dataset": "users:dataset",
        "loss": "users:loss",
        "evaluate": None,
        "optimizer": {"name": "SGD", "learningRate": BATCH},
        "batchSize": BATCH,
        "epochs": EPOCHS,
        "loaderWorkers": loaders,
    }
    return digits(**changes, **checkpoints(100), trainer=ours | trainer)


def job(folder: Path, changes: dict[str, Any], loaders: int, **trainer: Any) -> Job:
    return Job(folder=folder, spec=spec(folder, changes, loaders, **trainer))


def drawn_by_hand(epochs: Iterable[int]) -> torch.Tensor:
    """What each sample draws in these epochs, added up: a function of seed, epoch and sample."""
    total = torch.zeros(SAMPLES, 3, dtype=torch.float64)
    seeds = SampleSeeds(0)
    for epoch in epochs:
        seeds.begin(epoch)
        for sample in range(SAMPLES):
            seeds.set(sample)
            values = np.random.random(), random.random(), torch.rand((), dtype=torch.float64).item()
            total[sample] += torch.tensor(values, dtype=torch.float64)
    return total


def loaders_of(job: Job, index: int) -> list[int]:
    """The loader processes of a worker."""
    pid = job.processes[Role.WORKER, index].pid
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for listed in children for child in listed.read_text().split()]


def await_end(pids: list[int]) -> None:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    wait_for("the end of the loader processes", lambda: not any(map(alive, pids)), 20)


def trained(job: Job) -> dict[str, torch.Tensor]:
    assert job.checkpoints is not None
    return load_file(job.checkpoints / MODEL_FILE)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "changes", [pytest.param({}, id="DataParallel"), pytest.param(served("Sync", servers=2), id="Sync")]
)
def test_the_bits_are_the_same_with_any_number_of_loader_processes_and_whatever_is_killed(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    models = []
    for loaders in (0, 1, 3):
        folder = tmp_path / str(loaders)
        folder.mkdir()
        with job(folder, changes, loaders) as running:
            if loaders == 0:
                running.train()
            else:
                running.hold(6)
                running.start()
                running.until_held(6)
                assert len(loaders_of(running, 1)) == loaders
                if loaders == 1:
                    left = loaders_of(running, 1)
                    running.kill(Role.WORKER, 1)
                    await_end(left)
                else:
                    os.kill(loaders_of(running, 1)[2], signal.SIGKILL)
                running.let_go()
                running.complete()
                assert running.restarts == {(Role.WORKER, 1): 1}
            models.append(trained(running))
        if loaders == 3:
            said = "loader process 2 of 3 (trainer.loaderWorkers) was killed by SIGKILL"
            assert said in running.logs()
            assert "Traceback" not in running.logs()
    for model in models:
        assert model["times"].tolist() == [EPOCHS] * SAMPLES, "each sample is applied once an epoch"
        for name in ("drawn", "chance"):
            assert torch.equal(model[name], models[0][name])
    drawn = models[0]["drawn"].flatten().tolist()
    assert len(set(drawn)) == len(drawn), "no two samples draw the same"


HEDGED = {"consistency": "Sync", "backupWorkers": 1}
OUTER = {"learningRate": 1, "momentum": 0, "nesterov": False}
LOCAL = {"consistency": "Sync", "localSteps": 2, "outerOptimizer": OUTER}
EVERY_STRATEGY = [
    pytest.param({"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}, {}, id="FSDP2"),
    pytest.param(served("Async"), {}, id="Async"),
    pytest.param({}, {"gradientAccumulationSteps": 2}, id="accumulated gradients"),
    pytest.param(
        {**served("Sync"), "strategy": {"type": "ParameterServer", "parameterServer": HEDGED}},
        {"partsPerStep": 8},
        id="hedged parts",
    ),
    pytest.param(
        {**served("Sync"), "strategy": {"type": "ParameterServer", "parameterServer": LOCAL}}, {}, id="local steps"
    ),
    pytest.param(
        served("Sync"),
        {"script": {"file": "script.py"}, "model": None, "dataset": None, "loss": None},
        id="session.batches",
    ),
]


@pytest.mark.parametrize(("changes", "trainer"), EVERY_STRATEGY)
def test_every_strategy_trains_each_sample_once_an_epoch_on_batches_that_other_processes_load(
    tmp_path: Path, changes: dict[str, Any], trainer: dict[str, Any]
) -> None:
    with job(tmp_path, changes, 2, **trainer) as running:
        running.train()
        model = trained(running)
    times = model["times"]
    assert times.min() == times.max() > 0
    scale = times[0] / EPOCHS
    torch.testing.assert_close(model["drawn"], scale * drawn_by_hand(range(1, EPOCHS + 1)), rtol=1e-12, atol=1e-12)


def test_drop_leaves_the_end_of_each_epochs_order_out_and_counts_it(tmp_path: Path) -> None:
    batch, left = 24, SAMPLES % 24
    with job(
        tmp_path, {}, 1, lastBatch="Drop", batchSize=batch, optimizer={"name": "SGD", "learningRate": batch}
    ) as running:
        progress = running.train()
        model = trained(running)
    expected = torch.full((SAMPLES,), float(EPOCHS), dtype=torch.float64)
    order = KeyedPermutation(SAMPLES, 0)
    for epoch in range(EPOCHS):
        expected[torch.from_numpy(order(epoch, np.arange(SAMPLES - left, SAMPLES)))] -= 1
    torch.testing.assert_close(model["times"], expected)
    assert progress.dropped_samples == EPOCHS * left == 48


@pytest.mark.parametrize("loaders", [0, 2])
def test_an_error_of_a_sample_shows_the_line_of_the_user_whichever_process_loads_it(
    tmp_path: Path, loaders: int
) -> None:
    with job(tmp_path, {"worker": {"replicas": 1}}, loaders, dataset="users:broken") as running:
        running.start()
        assert running.wait(Role.WORKER) == 1
        termination, log = running.termination(Role.WORKER), running.log(Role.WORKER)
    line = USERS.splitlines().index('            raise ValueError("sample 7 is broken")') + 1
    assert termination.message == "ValueError: sample 7 is broken"
    assert termination.where == f"{tmp_path}/users.py:{line}"
    assert f'users.py", line {line}, in __getitem__' in log
    assert "disttrain_trainer" not in log.partition("Traceback")[2]
