"""DataParallel computes what one process computes on the whole batch, also when batches and parts are uneven."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.examples import mlp
from training.job import Job, checkpoints, digits, state
from training.test_parameter_server_sync import OPTIMIZERS

STEPS = 50
# At a ReLU rounding may decide: with momentum one of its inputs is 3e-8 in float32 and -3e-8 in float64, and a process that takes
# the other side of it is 0.002 away for good. A Tanh has no such place, and the bounds below are those of the rounding itself.
SMOOTH = """
from torch import nn
from disttrain_trainer.examples import mlp

def model(config):
    network = mlp.model(config)
    network[1] = nn.Tanh()
    return network
"""


def classic(*, workers: int, float64: bool, **trainer: Any) -> dict[str, Any]:
    """The 10-20-10 MLP: 100 samples in batches of 32, so that every fourth has 4."""
    module = "disttrain_trainer.examples.mlp"
    chosen = {
        "model": f"{module}:model",
        "dataset": f"{module}:dataset",
        "loss": f"{module}:loss",
        "evaluate": None,
        "batchSize": 32,
        "epochs": None,
        "maxSteps": STEPS,
        "config": {"samples": 100, "float64": float64},
    }
    return digits(worker={"replicas": workers}, trainer=chosen | trainer, **checkpoints(1000))


def classic_sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """That of `digits`, and so of `classic`."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def expected(
    *,
    float64: bool,
    smooth: bool = False,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] = classic_sgd,
) -> dict[str, torch.Tensor]:
    """Plain PyTorch in one process: the steps of its own optimizer on whole batches."""
    config = {"samples": 100, "float64": float64}
    torch.manual_seed(0)
    model = mlp.model(config)
    if smooth:
        model[1] = torch.nn.Tanh()
    inputs, targets = mlp.dataset(config, "train").tensors
    schedule = Schedule(samples=100, batch_size=32, parts_per_step=1, seed=0, max_steps=STEPS)
    stepper = optimizer(list(model.parameters()))
    for step in range(STEPS):
        indices = torch.tensor(schedule.part(step).indices)
        stepper.zero_grad()
        mlp.loss(model, [inputs[indices], targets[indices]]).backward()
        stepper.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("float64", "tolerance"), [(False, 1e-6), (True, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_number_of_workers_equals_one_process_on_the_whole_batch(
    tmp_path: Path, name: str, workers: int, float64: bool, tolerance: float
) -> None:
    settings, optimizer = OPTIMIZERS[name]
    (tmp_path / "smooth.py").write_text(SMOOTH)
    spec = classic(workers=workers, float64=float64, model="smooth:model", optimizer=settings)
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    saved = state(tmp_path, STEPS)
    for part, parameter in expected(float64=float64, smooth=True, optimizer=optimizer).items():
        torch.testing.assert_close(saved[f"model.{part}"], parameter, atol=tolerance, rtol=0)


def test_more_workers_than_samples_in_the_last_batch(tmp_path: Path) -> None:
    spec = classic(workers=3, float64=True, config={"samples": 33, "float64": True}, maxSteps=4)
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
