"""A user's mistake is reported in the user's terms: one line for wrong input, the user's own traceback for a bug."""

from pathlib import Path
from typing import Any

import pytest

from disttrain.api import environment
from disttrain.api.names import Role
from disttrain.api.storage import Data
from training.job import Job, checkpoints, digits, manifests, served

USERS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def model(config):
    return nn.Linear(4, 2)

def broken_model(config):
    return undefined_name

def not_a_model(config):
    return 3

def dataset(config, split):
    return TensorDataset(torch.ones(64, 4), torch.zeros(64, dtype=torch.int64))

def stream(config, split):
    return iter([1, 2])

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])

def exploding(model, batch):
    exploding.calls = getattr(exploding, "calls", 0) + 1
    return loss(model, batch) * (float("inf") if exploding.calls > 25 else 1)

def vector_loss(model, batch):
    return model(batch[0])[:, 0]

def leaving(model, batch):
    raise SystemExit(3)

def no_arguments():
    return nn.Linear(4, 2)

def no_split(config):
    return dataset(config, "train")

def three(config, split):
    return TensorDataset(torch.ones(64, 4), torch.ones(64, 4), torch.zeros(64))

def regression(config, split):
    return TensorDataset(torch.ones(64, 4), torch.zeros(64, 3))

def on_the_volume(config, split):
    import os
    return torch.load(os.environ["DISTTRAIN_DATA_DIR"] + "/part/train.pt")
"""


DATA = Data.model_validate({"volume": {"persistentVolumeClaim": "my-data"}})


def spec(**trainer: Any) -> dict[str, Any]:
    chosen = {name: f"users_code:{name}" for name in ("model", "dataset", "loss")}
    return digits(worker={"replicas": 1}, trainer=chosen | {"evaluate": None, "batchSize": 32, "epochs": 100} | trainer)


def fail(tmp_path: Path, code: int, **trainer: Any) -> tuple[Any, str]:
    """The termination message and the log of a worker that ends with this code."""
    (tmp_path / "users_code.py").write_text(USERS)
    with Job(folder=tmp_path, spec=spec(**trainer), env={environment.DATA_DIR: str(tmp_path / "data")}) as job:
        job.config = job.config.model_copy(update={"data": DATA})
        job.start()
        assert job.wait(Role.WORKER) == code, job.logs()
        return job.termination(Role.WORKER), job.log(Role.WORKER)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        pytest.param(
            {"model": "nowhere:model"}, "trainer.model: 'nowhere:model': there is no module 'nowhere' in", id="module"
        ),
        pytest.param({"model": "users_code:modle"}, "has no 'modle'; did you mean 'model'?", id="attribute"),
        pytest.param({"model": "users_code:not_a_model"}, "returned a int; expected a torch.nn.Module", id="no module"),
        pytest.param({"dataset": "users_code:stream"}, "expected a map-style dataset", id="no dataset"),
        pytest.param(
            {"model": "users_code:no_arguments"},
            "trainer.model: 'users_code:no_arguments' is defined as no_arguments(), but is called as no_arguments(config)",
            id="no arguments",
        ),
        pytest.param(
            {"dataset": "users_code:no_split"},
            "is defined as no_split(config), but is called as no_split(config, split)",
            id="no split",
        ),
        pytest.param(
            {"dataset": "users_code:on_the_volume"},
            "/data/part/train.pt: put train.pt on the claim my-data of data.volume",
            id="data that is not there",
        ),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, trainer: dict[str, str], said: str) -> None:
    termination, log = fail(tmp_path, 2, **trainer)
    assert said in termination.message
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("trainer", "message", "line"),
    [
        pytest.param(
            {"model": "users_code:broken_model"}, "NameError: name 'undefined_name' is not defined", 10, id="factory"
        ),
        pytest.param({"loss": "users_code:leaving"}, "SystemExit: 3", 32, id="sys.exit"),
    ],
)
def test_a_raising_function_shows_its_own_traceback(
    tmp_path: Path, trainer: dict[str, str], message: str, line: int
) -> None:
    termination, log = fail(tmp_path, 1, **trainer)
    assert termination.message == message
    assert termination.where.startswith(f"{tmp_path}/users_code.py:")
    assert "users_code.py" in log
    assert "disttrain_trainer/" not in log


def test_a_loss_that_is_no_scalar_is_named(tmp_path: Path) -> None:
    termination, log = fail(tmp_path, 1, loss="users_code:vector_loss")
    assert termination.message.startswith(
        "trainer.loss returned a Tensor of shape (32,); expected the batch's mean loss, a scalar tensor, (mean, weight) or "
        "(mean, weight, {name: value})"
    )
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (
            "three",
            "trainer.loss is not set, which means cross entropy of (input, target), but a batch of trainer.dataset is a list of 3",
        ),
        (
            "regression",
            "trainer.loss is not set, and cross entropy of what the model gives (torch.float32 (32, 2)) and the targets",
        ),
    ],
)
def test_data_that_cross_entropy_does_not_fit_asks_for_a_loss(tmp_path: Path, dataset: str, said: str) -> None:
    termination, log = fail(tmp_path, 1, loss=None, dataset=f"users_code:{dataset}")
    assert termination.message.startswith(said)
    assert termination.message.endswith("set trainer.loss")
    assert "Traceback" not in log


@pytest.mark.parametrize("changes", [pytest.param({}, id="DataParallel"), pytest.param(served("Sync"), id="Sync")])
def test_a_loss_that_is_not_finite_ends_the_training_and_no_checkpoint_holds_it(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "users_code.py").write_text(USERS)
    chosen = spec(loss="users_code:exploding") | changes | checkpoints(10)
    with Job(folder=tmp_path, spec=chosen) as job:
        job.start()
        assert job.wait(Role.WORKER) == 1, job.logs()
        assert job.termination(Role.WORKER).message.startswith(
            "the loss is inf on worker-0 at step 25: lower trainer.optimizer"
        )
        # Servers write the checkpoint of step 20 in the background, and may be at it yet.
        progress = job.until(
            lambda p: p.nan_loss is not None and p.last_checkpoint is not None and p.last_checkpoint.step == 20,
            tolerate=True,
        )
        assert progress.nan_loss == "worker-0 at step 25"
    assert [manifest["step"] for manifest in manifests(tmp_path / "checkpoints")] == [10, 20]


def test_a_full_volume_stops_no_training(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(**served("Sync"), **checkpoints(50))) as job:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "step-00000100").write_text("in the way, as a full disk would be")
        job.train()
        assert "a checkpoint was not written" in job.logs()
    assert [m["step"] for m in manifests(tmp_path / "checkpoints")][-1] == 230
