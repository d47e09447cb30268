"""The classic first network: 10-20-10, mean squared error on seeded random numbers. Its runs are compared bit by bit in tests."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

Config = dict[str, Any]


def model(config: Config) -> nn.Module:
    """Linear(10, hidden) - ReLU - Linear(hidden, 10). config: hidden (20), float64 (false)."""
    hidden = int(config.get("hidden", 20))
    network = nn.Sequential(nn.Linear(10, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return network.double() if config.get("float64") else network


def dataset(config: Config, split: str) -> TensorDataset:
    """Random inputs and targets, the same in every process. config: samples (1000)."""
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    dtype = torch.float64 if config.get("float64") else torch.float32
    samples = int(config.get("samples", 1000))
    inputs, targets = (torch.randn(samples, 10, generator=generator, dtype=dtype) for _ in range(2))
    return TensorDataset(inputs, targets)


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Mean squared error."""
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


def evaluate(model: nn.Module, dataset: TensorDataset) -> dict[str, float]:
    """The mean squared error on the test split."""
    inputs, targets = dataset.tensors
    device = next(model.parameters()).device
    return {"mse": nn.functional.mse_loss(model(inputs.to(device)), targets.to(device)).item()}
