"""A small language model over characters: a transformer of two layers on the help texts that Python itself ships.

The text is `pydoc_data.topics`, part of every CPython (PSF licence): about 700 KB of English about Python.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

Config = dict[str, Any]


class Transformer(nn.Module):
    """A decoder: embeddings, causal self-attention layers, and the distribution of the next character."""

    def __init__(self, *, characters: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        length = text.shape[1]
        places = torch.arange(length, device=text.device)
        hidden = self.characters(text) + self.positions(places)
        mask = self.get_buffer("mask")[:length, :length]
        logits: torch.Tensor = self.out(self.norm(self.layers(hidden, mask=mask, is_causal=True)))
        return logits


def model(config: Config) -> nn.Module:
    """config: context (64), width (64), heads (4), layers (2)."""
    return Transformer(
        characters=_text()[1],
        context=int(config.get("context", 64)),
        width=int(config.get("width", 64)),
        heads=int(config.get("heads", 4)),
        layers=int(config.get("layers", 2)),
    )


def dataset(config: Config, split: str) -> TensorDataset:
    """Windows of `context` characters, and the same shifted by one: what comes next. A tenth of the text is for the test."""
    text, _ = _text()
    cut, context = len(text) * 9 // 10, int(config.get("context", 64))
    part = text[:cut] if split == "train" else text[cut:]
    end = (len(part) - 1) // context * context
    return TensorDataset(part[:end].view(-1, context), part[1 : end + 1].view(-1, context))


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Cross entropy of the next character, in nats."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def evaluate(model: nn.Module, dataset: TensorDataset) -> dict[str, float]:
    """Bits per character of the first 256 windows of the test text."""
    device = next(model.parameters()).device
    batch = [tensor[:256].to(device) for tensor in dataset.tensors]
    return {"bits_per_character": loss(model, batch).item() / 0.6931471805599453}


@cache
def _text() -> tuple[torch.Tensor, int]:
    """The text as numbers of characters, and how many characters there are."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)
