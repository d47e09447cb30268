"""Models as others write them, and plans of users for them: right ones, and each mistake that a plan can make."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.data import TensorDataset

CHARACTERS, CONTEXT, WIDTH = 12, 4, 8


class Attention(nn.Module):
    """Grouped queries: 4 heads share 2 of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.repeats = 4, 2, 2
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = nn.Linear(WIDTH, WIDTH // 2, bias=False), nn.Linear(WIDTH, WIDTH // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, self.n_heads, -1).transpose(1, 2)
        k = self.wk(x).view(batch, length, self.n_kv_heads, -1).transpose(1, 2).repeat_interleave(self.repeats, dim=1)
        v = self.wv(x).view(batch, length, self.n_kv_heads, -1).transpose(1, 2).repeat_interleave(self.repeats, dim=1)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.wo(found.transpose(1, 2).reshape(batch, length, -1))
        return out


class FusedAttention(nn.Module):
    """One Linear for q, k and v, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).split(WIDTH, dim=-1)
        )
        found: torch.Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class SwiGLU(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 16, bias=False)
        self.w2 = nn.Linear(16, WIDTH, bias=False)
        self.inner = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.w2(self.inner(F.silu(self.w1(x)) * self.w3(x)))
        return found


class GatedExpert(nn.Module):
    """A Linear of one output scales the hidden layer; and one of three outputs, which two processes cannot share."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.odd = nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU(), nn.Linear(3, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(torch.sigmoid(self.gate(x)) * self.up(x)) + self.odd(x)
        return found


class Mixture(nn.Module):
    """Experts, of which a router chooses one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            of_this = chosen == number
            out[of_this] = expert(x[of_this]) * scores[of_this].unsqueeze(-1)
        return out


class Block(nn.Module):
    def __init__(self, attention: nn.Module, feed_forward: nn.Module, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.feed_forward = attention, feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        found: torch.Tensor = x + self.feed_forward(self.ffn_norm(x))
        return found


class Llama(nn.Module):
    """A decoder. Returns a dict, as models of Hugging Face do."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        attention = {"gqa": Attention, "fused": FusedAttention}[config.get("attention", "gqa")]
        ffn = {"swiglu": SwiGLU, "gated": GatedExpert, "moe": Mixture}[config.get("ffn", "swiglu")]
        more = {"dropout": 0.5} if config.get("inner_dropout") else {}
        self.tok_embeddings = nn.Embedding(CHARACTERS, WIDTH)
        self.layers = nn.ModuleList(Block(attention(), ffn(**more), config.get("dropout", 0.0)) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, CHARACTERS, bias=False)
        if config.get("tied"):
            self.output.weight = self.tok_embeddings.weight

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.tok_embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return {"logits": self.output(self.norm(hidden))}


def model(config: dict[str, Any]) -> nn.Module:
    return Llama(config).to(getattr(torch, config.get("dtype", "float64")))


def dataset(config: dict[str, Any], split: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(*(torch.randint(0, CHARACTERS, (19, CONTEXT), generator=generator) for _ in range(2)))


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(input_ids=inputs)["logits"].flatten(0, 1), targets.flatten())


def parallel_loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """In torch's loss_parallel: the logits are cut over the characters."""
    with loss_parallel():
        return loss(model, batch)


LAYER = {
    "attention.wq": ColwiseParallel(),
    "attention.wk": ColwiseParallel(),
    "attention.wv": ColwiseParallel(),
    "attention.wo": RowwiseParallel(),
    "feed_forward.w1": ColwiseParallel(),
    "feed_forward.w2": RowwiseParallel(),
    "feed_forward.w3": ColwiseParallel(),
}


def layers(model: Any, mesh: DeviceMesh, plan: dict[str, Any], *, heads: bool = True) -> Any:
    for layer in model.layers:
        if heads:
            layer.attention.n_heads //= mesh.size()
            layer.attention.n_kv_heads //= mesh.size()
        parallelize_module(layer, mesh, plan)
    return model


def plain(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    return layers(model, mesh["tensor"], LAYER)


def sequence(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    """As torchtitan's plan for Llama: activations between the layers are cut along the sequence, logits along the characters."""
    within = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan = LAYER | {
        "attention_norm": SequenceParallel(),
        "attention": within,
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": within,
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
    }
    outer = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(
            input_layouts=Shard(1),
            output_layouts=Shard(-1) if config.get("loss_parallel") else Replicate(),
            use_local_output=not config.get("loss_parallel"),
        ),
    }
    parallelize_module(model, mesh["tensor"], outer)
    return layers(model, mesh["tensor"], plan)


def forgotten_norm(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    """The sequence plan, in which the last norm was forgotten: it gets its part of the sequence as a plain tensor."""
    sequence(model, mesh, config)
    model.norm = nn.LayerNorm(WIDTH).to(torch.float64)
    return model


def sequence_then_shard(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    """Tensor, then FSDP2 on each layer, as torchtitan does both."""
    sequence(model, mesh, config)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["shard"])
    return fully_shard(model, mesh=mesh["shard"])


def shard_blocks(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["shard"])
    return model


def shard_without_a_mesh(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    return fully_shard(model)


def tied_again(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tensor"], plan)
    model.output.weight = model.tok_embeddings.weight
    return plain(model, mesh, config)


def untied(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh["tensor"], plan)


def own_mesh(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    return layers(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), LAYER)


def other_axis(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    return layers(model, mesh["tp"], LAYER)


def data_axis(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    return layers(model, mesh["replicate"], LAYER)


def all_heads(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    """Counts all heads in each process: a head gets the half of its width."""
    return layers(model, mesh["tensor"], LAYER, heads=False)


def renamed(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    return nn.ModuleDict({"wrapped": model})


def frozen(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    model.norm.requires_grad_(False)
    return model


def nothing(model: Any, mesh: DeviceMesh, config: dict[str, Any]) -> Any:
    layers(model, mesh["tensor"], LAYER)
