"""DataParallel computes what one process computes on the whole batch, also when batches and slices are uneven."""

from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain_trainer.data.slices import Schedule
from disttrain_trainer.examples import mlp
from training.job import Job, checkpoints, digits, state

STEPS = 50


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


def expected(*, float64: bool) -> dict[str, torch.Tensor]:
    """Plain PyTorch on whole batches: the gradient of the mean loss, and SGD with momentum written out."""
    config = {"samples": 100, "float64": float64}
    torch.manual_seed(0)
    model = mlp.model(config)
    inputs, targets = mlp.dataset(config, "train").tensors
    schedule = Schedule(samples=100, batch_size=32, world_size=1, seed=0, max_steps=STEPS)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(STEPS):
        indices = torch.tensor(schedule.slice(step).indices)
        gradients = torch.autograd.grad(
            torch.nn.functional.mse_loss(model(inputs[indices]), targets[indices]), list(model.parameters())
        )
        with torch.no_grad():
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                momentum[name].mul_(0.9).add_(gradient)
                parameter.sub_(momentum[name], alpha=0.1)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("float64", "tolerance"), [(False, 1e-6), (True, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_equals_one_process(
    tmp_path: Path, workers: int, float64: bool, tolerance: float
) -> None:
    with Job(folder=tmp_path, spec=classic(workers=workers, float64=float64)) as job:
        job.start()
        assert job.supervise() == 0, job.logs()
    saved = state(tmp_path, STEPS)
    for name, parameter in expected(float64=float64).items():
        torch.testing.assert_close(saved[f"model.{name}"], parameter, atol=tolerance, rtol=0)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_takes_the_steps_of_adam(tmp_path: Path, workers: int) -> None:
    optimizer = {"name": "Adam", "learningRate": "0.01", "weightDecay": "0.1"}
    with Job(folder=tmp_path, spec=classic(workers=workers, float64=True, optimizer=optimizer)) as job:
        job.start()
        assert job.supervise() == 0, job.logs()
    saved = state(tmp_path, STEPS)
    config = {"samples": 100, "float64": True}
    torch.manual_seed(0)
    model = mlp.model(config)
    stepper = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    inputs, targets = mlp.dataset(config, "train").tensors
    schedule = Schedule(samples=100, batch_size=32, world_size=1, seed=0, max_steps=STEPS)
    for step in range(STEPS):
        indices = torch.tensor(schedule.slice(step).indices)
        stepper.zero_grad()
        mlp.loss(model, [inputs[indices], targets[indices]]).backward()
        stepper.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[f"model.{name}"], parameter.detach(), atol=1e-12, rtol=0)


def test_more_workers_than_samples_in_the_last_batch(tmp_path: Path) -> None:
    spec = classic(workers=3, float64=True, config={"samples": 33, "float64": True}, maxSteps=4)
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        assert job.supervise() == 0, job.logs()
