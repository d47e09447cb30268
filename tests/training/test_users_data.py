"""Data as users have it: a last batch of one sample, samples of different length, augmentation by numpy and random."""

from pathlib import Path
from typing import Any

import pytest

from disttrain.api.names import Role
from training.job import Job, digits, served

USERS = """
import os, random
import numpy as np
import torch
from torch import nn

def table(samples):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))

def loss(model, batch):
    x, y = batch
    return nn.functional.mse_loss(model(x), y)

def normalized(config):
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

def dataset(config, split):
    return table(config["samples"])

def bag(config):
    return nn.EmbeddingBag(16, 1, padding_idx=0)

class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.arange(1, 3 + i % 5), torch.tensor([float(i)])

def sentences(config, split):
    return Sentences()

def padded(samples):
    words, targets = zip(*samples)
    return nn.utils.rnn.pad_sequence(words, batch_first=True), torch.stack(targets)

def linear(config):
    return nn.Linear(4, 1)

class Augmented(torch.utils.data.Dataset):
    def __init__(self):
        self.table = table(64)
        self.drawn = open(f"drawn-{os.environ['DISTTRAIN_INDEX']}-{os.getpid()}", "w", buffering=1)

    def __len__(self):
        return 64

    def __getitem__(self, i):
        self.drawn.write(f"{np.random.random()} {random.random()}\\n")
        return self.table[i]

def augmented(config, split):
    return Augmented()
"""

STRATEGIES = [pytest.param({}, id="DataParallel"), pytest.param(served("Sync", servers=1), id="Sync")]


def spec(changes: dict[str, Any], **trainer: Any) -> dict[str, Any]:
    ours = {"loss": "users:loss", "evaluate": None, "optimizer": {"name": "SGD", "learningRate": 0.01}, "batchSize": 16}
    return digits(**changes, trainer={**ours, "epochs": 2, **trainer})


def run(folder: Path, described: dict[str, Any]) -> Job:
    """The job, once it has ended by itself."""
    (folder / "users.py").write_text(USERS)
    with Job(folder=folder, spec=described) as job:
        job.train()
    return job


@pytest.mark.parametrize("samples", [33, 34])
@pytest.mark.parametrize("changes", STRATEGIES)
def test_a_model_with_batch_norm_trains_whatever_remains_of_an_epoch(
    tmp_path: Path, changes: dict[str, Any], samples: int
) -> None:
    job = run(tmp_path, spec(changes, model="users:normalized", dataset="users:dataset", config={"samples": samples}))
    progress = job.termination(Role.MASTER).progress
    assert progress is not None
    assert progress.finished


@pytest.mark.parametrize("changes", STRATEGIES)
def test_samples_of_different_length_train_by_a_collate_of_the_users(tmp_path: Path, changes: dict[str, Any]) -> None:
    run(tmp_path, spec(changes, model="users:bag", dataset="users:sentences", collate="users:padded", batchSize=8))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("changes", STRATEGIES)
def test_no_two_workers_draw_the_same_numbers(tmp_path: Path, changes: dict[str, Any], deterministic: bool) -> None:
    run(tmp_path, spec(changes, model="users:linear", dataset="users:augmented", deterministic=deterministic))
    drawn = [line for path in tmp_path.glob("drawn-*") for line in path.read_text().split()]
    assert len(drawn) >= 2 * 2 * 64
    assert len(set(drawn)) == len(drawn)
