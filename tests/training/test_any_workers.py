"""A training goes on with another number of workers: partsPerStep says how a step is cut, and the workers only who computes what."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from disttrain.api.names import MODEL_FILE
from local_runs.command import run
from training.job import checkpoints, digits, served

USERS = """
import os
from pathlib import Path

import torch
from torch import nn
from disttrain_trainer.examples import digits

class Centred(nn.Module):
    \"\"\"Buffers that decide about the gradient: what is subtracted is a mean over earlier steps.\"\"\"

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(24))
        self.register_buffer("parts", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        y = x - self.mean
        if self.training:
            self.mean.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
            self.parts += 1
        return y

def model(config):
    # Without a bias before BatchNorm: its gradient is nothing but rounding, of which Adam makes whole steps.
    first = nn.Linear(64, 24, bias=False)
    layers = [first, nn.BatchNorm1d(24), Centred(), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, 10)]
    return nn.Sequential(*layers).double()

class Recorded:
    \"\"\"Each sample that a worker loads is written down.\"\"\"

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 90

    def __getitem__(self, index):
        with open(f"seen-{os.environ.get('DISTTRAIN_ATTEMPT')}-{os.getpid()}", "a") as file:
            file.write(f"{index}\\n")
        image, label = self.data[index]
        return image.double(), label

def dataset(config, split):
    return Recorded(digits.dataset({}, split))

def loss(model, batch):
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)
"""
SAMPLES, BATCH, PARTS = 90, 24, 6


def job(strategy: dict[str, Any], *, workers: int, steps: int) -> dict[str, Any]:
    spec = digits(
        **strategy,
        **checkpoints(100),
        worker={"replicas": workers},
        trainer={
            "model": "users_code:model",
            "dataset": "users_code:dataset",
            "loss": "users_code:loss",
            "evaluate": None,
            "epochs": None,
            "maxSteps": steps,
            "batchSize": BATCH,
            "optimizer": {"name": "Adam", "learningRate": 0.01},
            "deterministic": True,
            "partsPerStep": PARTS,
        },
    )
    return {"apiVersion": "disttrain.dev/v1alpha1", "kind": "DistTrainJob", "metadata": {"name": "any"}, "spec": spec}


def trained(folder: Path, *stages: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model after these stages, each the file of the job as it is edited before `disttrain run --resume`."""
    (folder / "users_code.py").write_text(USERS)
    for number, stage in enumerate(stages):
        (folder / "job.yaml").write_text(yaml.safe_dump(stage))
        done = run(folder, "job.yaml", *(["--resume"] if number else []))
        assert done.code == 0, done.out + done.err
    (model,) = folder.glob(f".disttrain/**/{MODEL_FILE}")
    return load_file(model)


def seen(folder: Path) -> dict[int, list[int]]:
    """The samples that each attempt loaded, sorted."""
    found: dict[int, list[int]] = {}
    for file in folder.glob("seen-*"):
        found.setdefault(int(file.name.split("-")[1]), []).extend(map(int, file.read_text().split()))
    return {attempt: sorted(samples) for attempt, samples in found.items()}


SYNC = served("Sync")
DATA_PARALLEL: dict[str, Any] = {}
STAGES = (4, 8, 12)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The model that two workers train without a break."""
    return trained(tmp_path_factory.mktemp("calm"), job(SYNC, workers=2, steps=STAGES[-1]))


def stages(*strategies: dict[str, Any]) -> list[dict[str, Any]]:
    """A job of two workers that goes on with three, and then with one."""
    return [
        job(strategy, workers=workers, steps=steps)
        for strategy, workers, steps in zip(strategies, (2, 3, 1), STAGES, strict=True)
    ]


@pytest.mark.timeout(180)
def test_servers_train_the_same_bits_with_any_number_of_workers(tmp_path: Path, calm: dict[str, torch.Tensor]) -> None:
    three_servers = served("Sync", servers=3)
    changed = trained(tmp_path, *stages(SYNC, three_servers, three_servers))
    assert calm.keys() == changed.keys()
    assert [name for name in calm if not torch.equal(calm[name], changed[name])] == []
    assert seen(tmp_path) == {attempt: list(range(SAMPLES)) for attempt in (1, 2, 3)}, "an epoch each"


@pytest.mark.timeout(180)
def test_collectives_train_the_same_within_rounding_with_any_number_of_workers(
    tmp_path: Path, calm: dict[str, torch.Tensor]
) -> None:
    changed = trained(tmp_path, *stages(DATA_PARALLEL, DATA_PARALLEL, DATA_PARALLEL))
    assert calm.keys() == changed.keys()
    for name, tensor in calm.items():
        assert torch.allclose(changed[name], tensor, rtol=1e-12, atol=1e-12), name
    assert seen(tmp_path) == {attempt: list(range(SAMPLES)) for attempt in (1, 2, 3)}, "an epoch each"
