"""A job is done when its last checkpoint is: not before, not by one of a shorter job, and not by one that holds no numbers."""

import signal
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, manifests, served, state

DATA_PARALLEL = pytest.param({}, id="DataParallel")
SYNC = pytest.param(served("Sync"), id="Sync")
LAST = "step-00000023"

USERS = """
import math
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.linear(x)

def model(config):
    return Model()

def dataset(config, split):
    return TensorDataset(torch.ones(64, 4), torch.zeros(64, dtype=torch.int64))

def loss(model, batch):
    # 0 whose slope is 0 times infinity
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) + (model.zero * 0).abs().sqrt().sum()

def sound_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) + model.zero.sum() * 0

def evaluate(model, test):
    return {"perplexity": math.inf, "accuracy": 0.5}

def evaluate_in_half_precision(model, test):
    model.half()
    return {"accuracy": 0.5}
"""


def users(changes: dict[str, Any], **trainer: Any) -> dict[str, Any]:
    names = {"model": "users_code:model", "dataset": "users_code:dataset", "loss": "users_code:loss", "evaluate": None}
    chosen = names | {"epochs": None, "maxSteps": 1, "batchSize": 32} | trainer
    return digits(worker={"replicas": 1}, trainer=chosen) | changes | checkpoints(10)


@pytest.mark.parametrize("changes", [DATA_PARALLEL, SYNC])
def test_a_gradient_that_is_not_finite_fails_the_job_and_is_in_no_checkpoint(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "users_code.py").write_text(USERS)
    with Job(folder=tmp_path, spec=users(changes)) as job:
        job.start()
        assert job.supervise() == 1, job.logs()
        role = Role.PARAMETER_SERVER if changes else Role.WORKER
        said = [job.termination(role, index).message for key, index in job.keys if key is role]
        assert any("a parameter is not finite at step 1: lower trainer.optimizer" in words for words in said), said
        if changes:
            progress = job.until(lambda progress: progress.nan_loss is not None, tolerate=True)
            assert str(progress.nan_loss).startswith("parameter-server-")
            assert not progress.finished
    assert manifests(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("changes", [DATA_PARALLEL, SYNC])
def test_an_evaluation_that_is_not_finite_is_in_the_checkpoint_and_not_in_the_progress(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "users_code.py").write_text(USERS)
    spec = users(changes, loss="users_code:sound_loss", evaluate="users_code:evaluate")
    for _ in range(2):  # the second time it is read
        with Job(folder=tmp_path, spec=spec) as job:
            progress = job.train()
        assert progress.finished
        assert progress.evaluation == {"accuracy": 0.5}
        assert str(progress.warning).startswith("evaluation: perplexity is inf; JSON has no such number"), progress
    assert "skipped" not in job.logs()


@pytest.mark.parametrize("changes", [DATA_PARALLEL, SYNC])
def test_an_evaluation_that_converts_the_model_costs_neither_the_training_nor_its_checkpoint(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "users_code.py").write_text(USERS)
    spec = users(changes, loss="users_code:sound_loss", evaluate="users_code:evaluate_in_half_precision")
    with Job(folder=tmp_path, spec=spec) as job:
        progress = job.train()
    assert progress.evaluation == {"accuracy": 0.5}
    last = manifests(tmp_path / "checkpoints")[-1]
    assert last["finished"]
    assert {tensor["dtype"] for tensor in last["tensors"].values()} == {"F32"}


@pytest.mark.parametrize("changes", [DATA_PARALLEL, SYNC])
def test_a_finished_job_that_is_to_train_for_longer_goes_on(tmp_path: Path, changes: dict[str, Any]) -> None:
    for attempt, epochs in enumerate((1, 2), start=1):
        spec = digits(**changes, **checkpoints(50), trainer={"epochs": epochs})
        with Job(folder=tmp_path, spec=spec, attempt=attempt) as job:
            progress = job.train()
        assert progress.finished
        assert progress.step == epochs * 23
        assert manifests(tmp_path / "checkpoints")[-1]["evaluation"] == progress.evaluation
    assert "begins at step 23" in job.logs()


@pytest.mark.parametrize("changes", [DATA_PARALLEL, SYNC])
def test_a_job_waits_for_room_for_its_last_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "checkpoints").mkdir()
    in_the_way = tmp_path / "checkpoints" / LAST
    in_the_way.write_text("as a full disk would be")
    (tmp_path / "fault.py").write_text("from disttrain_trainer.checkpoint import final\nfinal.RETRY_SECONDS = 0.05\n")
    with Job(folder=tmp_path, spec=digits(**changes, **checkpoints(50), trainer={"epochs": 1}), peer_timeout=2) as job:
        job.start()
        job.until(lambda _: "was not written" in job.logs())
        assert not job.until(lambda _: True).finished
        in_the_way.unlink()
        job.complete()
    assert manifests(tmp_path / "checkpoints")[-1]["finished"]


def test_a_rank_that_cannot_write_the_last_checkpoint_ends_with_what_is_wrong_to_be_started_again(
    tmp_path: Path,
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LAST).write_text("as a full disk would be")
    fault = "from disttrain_trainer.checkpoint import final\nfinal.RETRY_SECONDS, final.GIVE_UP_SECONDS = 0.05, 0.2\n"
    (tmp_path / "fault.py").write_text(fault)
    with Job(folder=tmp_path, spec=digits(**checkpoints(50), trainer={"epochs": 1})) as job:
        job.start()
        assert job.wait(Role.WORKER) == 134, job.logs()
        said = job.termination(Role.WORKER).message
        assert said.startswith("the last checkpoint, of step 23, cannot be written: ")
        assert "File exists" in said


SECOND_SAVE = """
import os
from pathlib import Path
from disttrain_trainer.checkpoint import atomic
from disttrain_trainer.strategies.rank_checkpoints import RankCheckpoints

finish, write = RankCheckpoints.finish, atomic.write

def twice(self):
    self.save_now()  # what SIGTERM asks for in the last step
    atomic.write = die
    return finish(self)

def die(path, *how):
    if path.name != "manifest.json":
        return write(path, *how)
    Path("fault.py").unlink()
    os.kill(os.getpid(), 9)

RankCheckpoints.finish = twice
"""


def test_a_rank_that_is_ended_between_two_checkpoints_of_one_step_leaves_the_first(tmp_path: Path) -> None:
    (tmp_path / "fault.py").write_text(SECOND_SAVE)
    with Job(folder=tmp_path, spec=digits(**checkpoints(50), trainer={"epochs": 1})) as job:
        job.start()
        assert job.wait(Role.WORKER) == 128 + signal.SIGKILL
        assert [m["step"] for m in manifests(tmp_path / "checkpoints")] == [23]
        job.complete()
    assert manifests(tmp_path / "checkpoints")[-1]["finished"]
    assert state(tmp_path, 23), "one file is left"
