"""A server that is lost before the first checkpoint takes the training back to its very beginning, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.api.names import Role
from disttrain.api.runtime import Progress
from disttrain_trainer.examples import mlp
from disttrain_trainer.model.initial import FactoryNotRepeatable, InitialParameters
from disttrain_trainer.parameter_server import FlatModel
from training.job import Job, digits, held, served
from training.parameter_servers import make_config

MIDDLE = 60
MODEL = """
import hashlib
from torch import nn

KEPT = []

def model(config):
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

def kept_model(config):
    if not KEPT:
        KEPT.append(model(config))
    return KEPT[0]

def evaluate(model, test):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return {"bits": float(int(digest.hexdigest()[:13], 16))}  # all that a float can tell apart
"""


def train(folder: Path, *, kill: bool, model: str = "model") -> tuple[Job, Progress]:
    folder.mkdir()
    (folder / "users_code.py").write_text(MODEL)
    trainer: dict[str, Any] = {"model": f"users_code:{model}", "evaluate": "users_code:evaluate", "epochs": 5}
    # One worker: which of several computes a part, and with it the statistics of BatchNorm, is left to chance.
    spec = digits(**served("Sync"), worker={"replicas": 1}, trainer=held(**trainer))
    with Job(folder=folder, spec=spec) as job:
        if kill:
            job.hold(MIDDLE)
        job.start()
        if kill:
            job.until_held(MIDDLE)
            job.kill(Role.PARAMETER_SERVER, 1)
            job.let_go()
        progress = job.complete()
    return job, progress


@pytest.mark.parametrize("model", ["model", "kept_model"])
def test_a_training_that_starts_from_scratch_without_a_volume_ends_as_if_no_server_had_been_lost(
    tmp_path: Path, model: str
) -> None:
    _, whole = train(tmp_path / "whole", kill=False)
    job, broken = train(tmp_path / "broken", kill=True, model=model)
    assert broken.redone_steps >= MIDDLE
    assert broken.evaluation == whole.evaluation
    # A factory that gives the trained model again is found out, and asked in a new process.
    assert job.restarts.get((Role.WORKER, 0), 0) == (1 if model == "kept_model" else 0)


def first_of(flat_seed: int) -> tuple[FlatModel, InitialParameters]:
    """A model of this seed, in a job whose seed is 3."""
    config = make_config()
    trainer = config.trainer.model_copy(update={"model": "disttrain_trainer.examples.mlp:model", "seed": 3})
    torch.manual_seed(flat_seed)
    flat = FlatModel(mlp.model({}))
    return flat, InitialParameters(config.model_copy(update={"trainer": trainer}), flat.parameters)


def test_the_first_parameters_come_back_from_the_factory_and_the_seed() -> None:
    flat, first = first_of(3)
    expected = [vector.clone() for vector in flat.parameters]
    for vector in flat.parameters:
        vector.add_(1)
    assert isinstance(first.restore(flat.parameters), nn.Module)
    assert all(torch.equal(vector, then) for vector, then in zip(flat.parameters, expected, strict=True))


def test_a_factory_that_makes_another_model_is_found_out() -> None:
    flat, first = first_of(4)
    with pytest.raises(FactoryNotRepeatable, match="did not make the same model a second time") as raised:
        first.restore(flat.parameters)
    assert raised.value.exit_code == 75
