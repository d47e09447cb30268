"""A small language model over characters: a transformer of two layers on the help texts that Python itself ships.

The text is `pydoc_data.topics`, part of every CPython (PSF licence): about 700 KB of English about Python.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

Config = dict[str, Any]


class Embedding(nn.Module):
    """Characters to vectors, with their places: (batch, length) to (batch, length, width)."""

    def __init__(self, *, characters: int, context: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        found: torch.Tensor = self.characters(text) + self.positions(places)
        return found


class Attention(nn.Module):
    """Causal self-attention. One Linear each for q, k, v and o, so that heads can be shared out among processes."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.v, self.o = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(
            width, width, bias=False
        )  # a bias would add the same to all scores of a query: softmax does not see it

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            linear(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.o(found.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Attention and a network of one hidden layer, each added to what it gets."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width=width, heads=heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden)))
        hidden = hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))
        return hidden


class Transformer(nn.Module):
    """A decoder: embeddings, causal self-attention layers, and the distribution of the next character."""

    def __init__(
        self, *, characters: int, context: int, width: int, heads: int, layers: int, dropout: float, tied: bool
    ) -> None:
        super().__init__()
        self.embedding = Embedding(characters=characters, context=context, width=width)
        self.layers = nn.ModuleList(Layer(width=width, heads=heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, characters)
        if tied:
            self.out.weight = self.embedding.characters.weight

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        hidden = text
        for stage in self.pipeline_stages():
            hidden = stage(hidden)
        return hidden

    def pipeline_stages(self) -> list[nn.Module]:
        """What forward() calls one after the other."""
        return [self.embedding, *self.layers, self.norm, self.out]


def model(config: Config) -> nn.Module:
    """config: context (64), width (64), heads (4), layers (2), dropout (0), tied (False: the last layer has weights of its own)."""
    return Transformer(
        characters=_text()[1],
        context=int(config.get("context", 64)),
        width=int(config.get("width", 64)),
        heads=int(config.get("heads", 4)),
        layers=int(config.get("layers", 2)),
        dropout=float(config.get("dropout", 0)),
        tied=bool(config.get("tied", False)),
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
