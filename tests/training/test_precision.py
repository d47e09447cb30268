"""Jobs in bfloat16 learn what they learn in float32, in every strategy; and what a loss names beside its mean comes into the report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttrain.api.names import MODEL_FILE
from training.job import Job, checkpoints, digits, served

USERS = """
import torch
from torch import nn
from disttrain_trainer.examples import charlm

def loss(model, batch):
    inputs, targets = batch
    found = model(inputs)
    mean = nn.functional.cross_entropy(found.flatten(0, 1), targets.flatten())
    right = (found.argmax(-1) == targets).float().mean()
    return mean, None, {"again": mean, "accuracy": right, "half": found.dtype is torch.bfloat16, "none": float("nan")}
"""
STRATEGIES: dict[str, dict[str, Any]] = {
    "data parallel": {},
    "servers": served("Sync"),
    "fully sharded": {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}},
    "tensor": {"strategy": {"type": "ModelParallel", "modelParallel": {"tensor": 2}}},
    "pipeline": {
        "strategy": {
            "type": "ModelParallel",
            "modelParallel": {"pipeline": 2, "schedule": "OneForwardOneBackward", "microbatches": 2},
        }
    },
}


def train(folder: Path, strategy: dict[str, Any], **trainer: Any) -> tuple[float, dict[str, float], dict[str, float]]:
    """The loss, the named values and the evaluation of a small language model."""
    folder.mkdir(exist_ok=True)
    (folder / "users.py").write_text(USERS)
    names = {name: f"disttrain_trainer.examples.charlm:{name}" for name in ("model", "dataset", "evaluate")}
    more = {
        "loss": "users:loss",
        "config": {"context": 16, "width": 32, "heads": 2, "dropout": 0.1},
        "optimizer": {"name": "AdamW", "learningRate": 0.01},
        "epochs": None,
        "maxSteps": 40,
        "batchSize": 32,
        "partsPerStep": 2,
    }
    with Job(folder=folder, spec=digits(**strategy, **checkpoints(100), trainer=names | more | trainer)) as job:
        progress = job.train()
    assert progress.loss is not None
    state = load_file(folder / "checkpoints" / MODEL_FILE)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    return progress.loss, dict(progress.values or {}), dict(progress.evaluation or {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, float], dict[str, float]]:
    return train(tmp_path_factory.mktemp("whole"), {})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_job_in_bfloat16_ends_within_two_per_cent_of_the_loss_in_float32(
    tmp_path: Path, strategy: str, whole: tuple[float, dict[str, float], dict[str, float]]
) -> None:
    loss, values, evaluation = train(tmp_path, STRATEGIES[strategy], precision="BFloat16")
    print(f"{strategy}: {loss} in bfloat16, {whole[0]} in float32; evaluation {evaluation} and {whole[2]}")
    assert loss == pytest.approx(whole[0], rel=0.02)
    assert evaluation == pytest.approx(whole[2], rel=0.02)
    assert values.keys() == {"again", "accuracy", "half"}
    assert values["half"] == 1
    assert values["again"] == pytest.approx(loss, rel=1e-5)
    assert values["accuracy"] == pytest.approx(whole[1]["accuracy"], abs=0.03)
    assert whole[1]["half"] == 0
