"""trainer.deterministic: the same bits on every run, whole or interrupted, with any number of workers and draws of any library."""

from pathlib import Path
from typing import Any

import pytest
import torch

from training.job import Job, checkpoints, digits, held, state

STEPS = 60
USERS = """
import random
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from disttrain_trainer.examples import digits

class Noisy(Dataset):
    def __init__(self, split):
        self.whole = digits.dataset({}, split)
        self.order = np.random.permutation(len(self.whole))

    def __len__(self):
        return len(self.whole)

    def __getitem__(self, i):
        image, digit = self.whole[self.order[i]]
        return image + random.gauss(0, 0.01) + torch.from_numpy(np.random.normal(0, 0.01, 64)).float(), digit

def dataset(config, split):
    return Noisy(split)

def model(config):
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""


def spec(workers: int, every: int) -> dict[str, Any]:
    trainer = held(
        model="users:model", dataset="users:dataset", evaluate=None, deterministic=True, epochs=None, maxSteps=STEPS
    )
    return digits(worker={"replicas": workers}, trainer=trainer, **checkpoints(every))


def run(folder: Path, *, workers: int, stop_at: int = 0) -> tuple[dict[str, torch.Tensor], float | None]:
    """The final state and the loss that the job reports; stop_at: all processes are killed after the checkpoint of this step."""
    folder.mkdir()
    (folder / "users.py").write_text(USERS)
    if stop_at:
        with Job(folder=folder, spec=spec(workers, stop_at)) as job:
            job.hold(stop_at + 1)
            job.start()
            job.until_held(stop_at + 1, checkpoint=stop_at)
            for role, index in job.keys:
                job.kill(role, index)
                job.wait(role, index)
            job.let_go()
    with Job(folder=folder, spec=spec(workers, stop_at or 1000), attempt=2) as job:
        progress = job.train()
    return state(folder, STEPS), progress.loss


@pytest.mark.parametrize("workers", [2, 3])
def test_two_runs_one_of_them_interrupted_are_the_same_bit_by_bit(tmp_path: Path, workers: int) -> None:
    whole, loss = run(tmp_path / "whole", workers=workers)
    broken, loss_of_broken = run(tmp_path / "broken", workers=workers, stop_at=10)
    assert loss == loss_of_broken is not None
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
