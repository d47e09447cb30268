"""What a user's model, loss and evaluation may do under DataParallel, and what is said when ranks do not train the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, manifests, state

USERS = """
import os
import torch
from torch import nn
from torch.utils.data import TensorDataset
from disttrain_trainer.examples import digits

rank = int(os.environ["DISTTRAIN_INDEX"])

class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 10)
        self.register_buffer("ema", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.ema = 0.5 * self.ema + 0.5  # another tensor takes the buffer's place
        return self.body(x)

    def regularised(self, x, y):
        return nn.functional.cross_entropy(self(x), y) + 1e-3 * self.body.weight.square().sum()

def model(config):
    return Averaged()

def another_model(config):
    return nn.Sequential(nn.Linear(64, 10)) if rank else nn.Sequential(nn.Linear(64, 11), nn.Linear(11, 10))

def fewer(config, split):
    return TensorDataset(*(tensor[: 900 - rank] for tensor in digits.dataset({}, split).tensors))

def method(model, batch):
    return model.regularised(*batch)

def parts(model, batch):
    return nn.functional.cross_entropy(model.body(batch[0]), batch[1])

def failing(model, dataset):
    raise ValueError("no such metric")
"""


def job(folder: Path, *, workers: int = 2, every: int = 1000, **trainer: Any) -> Job:
    (folder / "users.py").write_text(USERS)
    chosen = {"model": "users:model", "evaluate": None, "epochs": None, "maxSteps": 8} | trainer
    return Job(folder=folder, spec=digits(worker={"replicas": workers}, trainer=chosen, **checkpoints(every)))


@pytest.mark.parametrize("loss", ["users:method", "users:parts"])
def test_a_loss_may_call_any_part_of_the_users_model(tmp_path: Path, loss: str) -> None:
    results = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        with job(folder, workers=workers, loss=loss) as running:
            running.train()
        results.append(state(folder, 8)["model.body.weight"])
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_a_buffer_that_the_model_assigns_is_saved_and_restored(tmp_path: Path) -> None:
    for steps, attempt in ((4, 1), (8, 2)):
        with job(tmp_path, every=4, maxSteps=steps) as running:
            running.config = running.config.model_copy(update={"attempt": attempt})
            running.train()
        assert state(tmp_path, steps)["model.ema"].item() == 1 - 0.5**steps


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"dataset": "users:fewer"}, "training samples, others have"),
        ({"model": "users:another_model"}, "has another model than the others"),
    ],
)
def test_ranks_that_train_different_things_are_refused_at_once(
    tmp_path: Path, trainer: dict[str, str], said: str
) -> None:
    with job(tmp_path, **trainer) as running:
        running.start()
        running.until(lambda _: any(said in running.log(Role.WORKER, index) for index in range(2)), tolerate=True)
        (index,) = [index for index in range(2) if said in running.log(Role.WORKER, index)]
        assert running.wait(Role.WORKER, index) == 2
        assert said in running.termination(Role.WORKER, index).message


def test_an_evaluation_that_fails_does_not_cost_the_trained_model(tmp_path: Path) -> None:
    with job(tmp_path, workers=1, evaluate="users:failing") as running:
        running.start()
        assert running.wait(Role.WORKER, 0) == 1
        assert running.termination(Role.WORKER, 0).message == "ValueError: no such metric"
    (manifest,) = manifests(tmp_path / "checkpoints")
    assert (manifest["step"], manifest["finished"]) == (8, False)
