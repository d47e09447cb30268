"""A checkpoint fits every strategy and every number of servers: the training goes on as if nothing had been changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttrain.api.names import MODEL_FILE
from training.job import Job, checkpoints, digits, served

USERS = """
from torch import nn
from disttrain_trainer.examples import digits

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 30)
        self.frozen = nn.Linear(30, 30)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(30, 10)
        self.double()

    def forward(self, x):
        return self.head(self.frozen(self.first(x.double()).tanh()))

def model(config):
    return Model()
"""
DATA_PARALLEL: dict[str, Any] = {}


def trained(
    folder: Path,
    *stages: tuple[dict[str, Any], int],
    dtype: str = "float64",
    deterministic: bool = True,
    parts: int | None = None,
    users: str = USERS,
) -> dict[str, torch.Tensor]:
    """The model after these stages, each a way to train and the step to which it goes, all from the checkpoint of the one before."""
    folder.mkdir()
    (folder / "users_model.py").write_text(users if dtype == "float64" else users.replace("double()", f"{dtype}()"))
    optimizer = {"name": "Adam", "learningRate": 0.01}
    names = {
        "model": "users_model:model",
        "evaluate": None,
        "epochs": None,
        "optimizer": optimizer,
        "deterministic": deterministic,
        "partsPerStep": parts,
    }
    for attempt, (changes, steps) in enumerate(stages, start=1):
        spec = digits(**changes, **checkpoints(100), trainer=names | {"maxSteps": steps})
        with Job(folder=folder, spec=spec, attempt=attempt) as job:
            job.train()
            if attempt > 1:
                assert f"begins at step {stages[attempt - 2][1]}" in job.logs()
    return load_file(folder / "checkpoints" / MODEL_FILE)


def test_another_number_of_servers_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    two, three = served("Sync", servers=2), served("Sync", servers=3)
    calm = trained(tmp_path / "calm", (two, 9))
    changed = trained(tmp_path / "changed", (two, 3), (three, 6), (served("Sync", servers=1), 9))
    assert calm.keys() == changed.keys()
    assert all(torch.equal(calm[name], changed[name]) for name in calm)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_training_goes_from_servers_to_collectives_and_back_within_rounding(tmp_path: Path, servers: int) -> None:
    sync = served("Sync", servers=servers)
    calm = trained(tmp_path / "calm", (sync, 9))
    changed = trained(tmp_path / "changed", (sync, 3), (DATA_PARALLEL, 6), (sync, 9))
    assert calm.keys() == changed.keys()
    for name, tensor in calm.items():
        assert torch.allclose(changed[name], tensor, rtol=1e-12, atol=1e-12), name


def test_a_training_goes_from_any_sharding_to_any_other_strategy_and_back_within_rounding(tmp_path: Path) -> None:
    def workers(strategy: dict[str, Any], count: int) -> dict[str, Any]:
        return strategy | {"worker": {"replicas": count}}

    full, half = (
        {"strategy": {"type": "DataParallel", "dataParallel": sharded}}
        for sharded in ({"sharding": "FullyShard"}, {"sharding": "HybridShard", "shardSize": 2})
    )
    sync = served("Sync", servers=2)
    stages = [workers(full, 3), sync, workers(half, 4), DATA_PARALLEL, full, workers(half, 2)]
    calm = trained(tmp_path / "calm", (DATA_PARALLEL, 12), parts=4)
    changed = trained(
        tmp_path / "changed", *((stage, 2 * number) for number, stage in enumerate(stages, start=1)), parts=4
    )
    assert calm.keys() == changed.keys()
    for name, tensor in calm.items():
        assert torch.allclose(changed[name], tensor, rtol=1e-12, atol=1e-12), name


def test_a_training_goes_from_tensor_and_pipeline_parts_to_any_other_strategy_and_back(tmp_path: Path) -> None:
    def cut(count: int, sharding: str = "Replicated", **parts: int) -> dict[str, Any]:
        strategy = {"type": "Hybrid", "modelParallel": parts, "dataParallel": {"sharding": sharding}}
        return {"strategy": strategy, "worker": {"replicas": count}}

    full = {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}
    stages = [
        cut(2, tensor=2),
        full,
        cut(4, pipeline=2),
        served("Sync", servers=2),
        cut(4, "FullyShard", pipeline=2),
        cut(4, tensor=2),
        DATA_PARALLEL,
    ]
    users = USERS.replace(
        "def model(config):\n    return Model()",
        "def model(config):\n"
        "    first, second = nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 30)), nn.Linear(30, 10)\n"
        "    return nn.Sequential(Double(), first, second).double()",
    ).replace(
        "class Model", "class Double(nn.Module):\n    def forward(self, x):\n        return x.double()\n\nclass Model"
    )
    calm = trained(tmp_path / "calm", (DATA_PARALLEL, 14), parts=2, users=users)
    changed = trained(
        tmp_path / "changed",
        *((stage, 2 * number) for number, stage in enumerate(stages, start=1)),
        parts=2,
        users=users,
    )
    assert calm.keys() == changed.keys()
    for name, tensor in calm.items():
        assert torch.allclose(changed[name], tensor, rtol=1e-12, atol=1e-12), name


def test_a_training_goes_from_one_consistency_to_another(tmp_path: Path) -> None:
    """Within whole steps: what a version counts differs, and so do the files of the servers."""
    stages = [
        (served("Sync"), 3),
        (served("Async"), 6),
        (served("BoundedStaleness", staleness=1), 9),
        (served("Sync", servers=1), 12),
    ]
    once = trained(tmp_path / "once", stages[0], deterministic=False)
    twice = trained(tmp_path / "twice", *stages, deterministic=False)
    assert once.keys() == twice.keys()
    assert all(bool(tensor.isfinite().all()) for tensor in twice.values())
    assert not torch.equal(once["head.weight"], twice["head.weight"])
    assert torch.equal(once["frozen.weight"], twice["frozen.weight"])
