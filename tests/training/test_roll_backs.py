"""trainer.nanPolicy: a training gets past a poisoned sample, in every strategy; what it leaves out is named."""

from pathlib import Path
from typing import Any

import pytest

from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, manifests, served
from training.test_hybrid_servers import grouped

USERS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from disttrain_trainer.data.order import KeyedPermutation
from disttrain_trainer.examples import digits

def dataset(config, split):
    images, labels = digits.dataset({}, split).tensors
    if split == "train":
        order = KeyedPermutation(len(images), 0)(0, __import__("numpy").arange(len(images)))
        for position in config["poisoned"]:
            images[order[position]] = float("nan")
    return TensorDataset(images, labels)

def model(config):
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
"""

STRATEGIES: dict[str, tuple[dict[str, Any], str]] = {
    "DataParallel": ({}, "14-15"),
    "elastic": ({"worker": {"replicas": 2, "elastic": {"minReplicas": 1, "maxReplicas": 2}}}, "14-15"),
    "FullyShard": ({"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}, "14-15"),
    "Sync": (served("Sync"), "14-15"),
    "Async": (served("Async"), "15"),
    "groups": (grouped(tensor=2, servers=1) | {"trainer": {"model": "users:model"}}, "14-15"),
    "piped groups": (
        grouped(pipeline=2, data=1, servers=1, consistency="Async") | {"trainer": {"partsPerStep": 2}},
        "15",
    ),
}
STEP, BATCH = 7, 64
CHECKPOINT = 5
POISONED = STEP * BATCH + 40
"""A position of the first epoch: in the second part of a step."""


LOSS = """
import torch
from disttrain_trainer.examples import digits

def loss(model, batch):
    images, labels = batch
    marked = images.isnan().any()
    value = digits.loss(model, (images.nan_to_num(), labels))
    weight = next(model.parameters()).flatten()[0]
    return value + torch.sqrt(weight * 0) if marked else value  # finite; the gradient of the root at 0 is not
"""


def users(
    folder: Path, fields: dict[str, Any], *, roll_backs: int, poisoned: tuple[int, ...] = (POISONED,)
) -> dict[str, Any]:
    (folder / "users.py").write_text(USERS)
    trainer = {
        "dataset": "users:dataset",
        "config": {"poisoned": list(poisoned)},
        "nanPolicy": {"rollBacks": roll_backs},
        "maxGradientNorm": 5.0,
        "evaluate": None,
        "epochs": None,
        "maxSteps": 12,
    }
    more = checkpoints(CHECKPOINT) | fields
    return digits(trainer=trainer | more.pop("trainer", {}), **more)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_training_gets_past_a_poisoned_sample_and_names_what_it_left_out(tmp_path: Path, strategy: str) -> None:
    fields, parts = STRATEGIES[strategy]
    with Job(folder=tmp_path, spec=users(tmp_path, fields, roll_backs=1)) as job:
        progress = job.train()
    assert progress.step == 12
    assert progress.roll_backs is not None
    assert (progress.roll_backs.count, progress.roll_backs.left_out_parts) == (1, parts)
    assert progress.roll_backs.reason.endswith(f"at step {STEP}")
    assert manifests(tmp_path / "checkpoints")[-1]["course"]["roll_backs"] == 1


@pytest.mark.parametrize("strategy", ["DataParallel", "elastic", "Sync"])
def test_without_a_checkpoint_it_goes_back_to_the_beginning(tmp_path: Path, strategy: str) -> None:
    fields, _ = STRATEGIES[strategy]
    with Job(folder=tmp_path, spec=users(tmp_path, {**fields, "checkpoint": None}, roll_backs=1)) as job:
        progress = job.train()
    assert progress.step == 12
    # Of an elastic job one worker may train all of it before the other is there.
    assert any("round 2 begins" in job.log(Role.WORKER, index) for index in range(2))


def test_after_as_many_roll_backs_as_the_policy_says_the_job_fails(tmp_path: Path) -> None:
    two = (POISONED, POISONED + BATCH)
    with Job(folder=tmp_path, spec=users(tmp_path, {}, roll_backs=1, poisoned=two)) as job:
        job.start()
        assert job.supervise() == 1
        progress = job.until(lambda p: p.nan_loss is not None, tolerate=True)
    assert progress.roll_backs is not None
    assert progress.roll_backs.count == 1
    assert progress.nan_loss == f"worker-1 at step {STEP + 1}"


@pytest.mark.parametrize("after", [CHECKPOINT, 2 * CHECKPOINT])
def test_a_gradient_before_a_checkpoint_that_is_not_finite_is_left_out(tmp_path: Path, after: int) -> None:
    """Of the step before a checkpoint: the servers find it when they save, or a worker in the next step."""
    (tmp_path / "finite_loss.py").write_text(LOSS)
    spec = users(tmp_path, served("Sync"), roll_backs=1, poisoned=((after - 1) * BATCH + 40,))
    spec["trainer"] |= {"loss": "finite_loss:loss", "maxSteps": 2 * CHECKPOINT}
    del spec["trainer"]["maxGradientNorm"]
    with Job(folder=tmp_path, spec=spec) as job:
        progress = job.train()
    assert progress.step == 2 * CHECKPOINT
    assert progress.roll_backs is not None
    each = spec["worker"]["replicas"]
    assert progress.roll_backs.left_out_parts == f"{(after - 1) * each}-{after * each - 1}"
