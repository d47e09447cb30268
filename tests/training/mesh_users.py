"""A user's language model with all that a mesh could get wrong: buffers, dropout, tied embeddings, frozen layers, a loss with a weight."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import TensorDataset

from disttrain_trainer.examples import charlm

CHARACTERS, CONTEXT = 11, 4


class Normal(nn.Module):
    """A layer after a BatchNorm over all places of a text."""

    def __init__(self, width: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(self.norm(hidden.flatten(0, 1)).view(hidden.shape))
        return found


def model(config: dict[str, Any]) -> nn.Module:
    """config: tied, frozen, unused (all False), dtype (float64)."""
    torch.manual_seed(1)
    made = charlm.Transformer(
        characters=CHARACTERS,
        context=CONTEXT,
        width=8,
        heads=2,
        layers=2,
        dropout=0.1,
        tied=config.get("tied", False),
    )
    # Nothing with a bias comes before the BatchNorm: it takes the bias away again, and Adam would make a step of the rounding of 0.
    made.layers[0] = Normal(8, made.layers[0])
    if config.get("frozen"):
        made.layers[0].requires_grad_(False)
        made.embedding.requires_grad_(False)
    if config.get("unused"):
        made.unused = nn.Linear(3, 3)
    return made.to(getattr(torch, config.get("dtype", "float64")))


def dataset(config: dict[str, Any], split: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(*(torch.randint(0, CHARACTERS, (43, CONTEXT), generator=generator) for _ in range(2)))


def loss(model: nn.Module, batch: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Of the characters that are not 0; it draws before and after the model, too."""
    inputs, targets = batch
    scale = 1 + torch.rand(()).item()
    logits = model(inputs).flatten(0, 1)
    mean = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=0)
    return mean * (scale + torch.rand(()).item()), float((targets != 0).sum())


def mean_loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return charlm.loss(model, batch)


def token_mean(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Of the characters that are not 0; its graph says how many these are."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=0)


def evaluate(model: nn.Module, dataset: TensorDataset) -> dict[str, float]:
    return {"loss": charlm.loss(model, list(dataset.tensors)).item()}


def split(model: Any, stages: int, config: dict[str, Any]) -> list[nn.Module]:
    """The user's own cut: as uneven as can be."""
    pieces = model.pipeline_stages()
    return [*pieces[: stages - 1], nn.Sequential(*pieces[stages - 1 :])]


def parallelize(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> nn.Module:
    """The user's own plan: of the first layer its MLP alone."""
    plan = {"layers.0.layer.mlp.0": ColwiseParallel(), "layers.0.layer.mlp.2": RowwiseParallel()}
    return parallelize_module(model, mesh["tensor"], plan)
