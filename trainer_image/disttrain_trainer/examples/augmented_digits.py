"""Handwritten digits once more, as one trains on images: a residual network with BatchNorm, and augmentation by numpy and `random`.

Each time that a sample is loaded it is moved by up to a pixel, made lighter or darker, and gets some noise; test images stay as they are.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from disttrain_trainer.examples import digits

Config = dict[str, Any]
Sample = tuple[torch.Tensor, ...]

evaluate = digits.evaluate


class Augmented(Dataset[Sample]):
    """Images that look different each time."""

    def __init__(self, images: TensorDataset) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> Sample:
        image, digit = self._images[number]
        down, right = random.randint(-1, 1), random.randint(-1, 1)
        moved = nn.functional.pad(image.view(8, 8), (1, 1, 1, 1))[1 + down : 9 + down, 1 + right : 9 + right]
        noise = torch.from_numpy(np.random.normal(scale=0.02, size=(8, 8)).astype(np.float32))
        return (moved * random.uniform(0.9, 1.1) + noise).flatten(), digit


class Residual(nn.Module):
    """Two convolutions with BatchNorm, added to what they get."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False) for _ in range(2)
        )
        self.first_norm, self.second_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.first_norm(self.first(images)).relu()
        out: torch.Tensor = (images + self.second_norm(self.second(hidden))).relu()
        return out


def model(config: Config) -> nn.Module:
    """config: channels (16), blocks (2)."""
    channels, blocks = int(config.get("channels", 16)), int(config.get("blocks", 2))
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Sequential(*(Residual(channels) for _ in range(blocks))),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(channels * 4 * 4, 10),
    )


def dataset(config: Config, split: str) -> Dataset[Sample]:
    """The digits; those to train on look different each time."""
    images = digits.dataset(config, split)
    return Augmented(images) if split == "train" else images


def loss(model: nn.Module, batch: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross entropy; and the part of the images whose digit is found, to be reported."""
    images, classes = batch
    found = model(images)
    return nn.functional.cross_entropy(found, classes), {"accuracy": (found.argmax(dim=1) == classes).float().mean()}
