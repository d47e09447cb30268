"""A small language model on a mesh, and the same in one process that computes the same parts and micro-batches in turn."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from disttrain.api.strategy import Schedule
from disttrain_trainer.data import schedule
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.examples import charlm
from disttrain_trainer.parallel import pipeline, tensor
from disttrain_trainer.parallel.chance import Chance

STEPS, BATCH, SAMPLES, CONTEXT = 20, 8, 43, 4
MICROBATCH = 2
CPU = torch.device("cpu")


class Normal(nn.Module):
    """A layer after a BatchNorm over all places of a text."""

    def __init__(self, width: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(self.norm(hidden.flatten(0, 1)).view(hidden.shape))
        return found


def model(
    *, tied: bool = False, frozen: bool = False, dropout: float = 0.1, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """With buffers, dropout, and if asked for tied embeddings and a frozen layer."""
    torch.manual_seed(1)
    made = charlm.Transformer(characters=11, context=CONTEXT, width=8, heads=2, layers=2, dropout=dropout, tied=tied)
    made.layers[1] = Normal(8, made.layers[1])
    if frozen:
        made.layers[0].requires_grad_(False)
        made.embedding.requires_grad_(False)
    return made.to(dtype)


def loss(model: nn.Module, batch: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Of the characters that are not 0; it draws before and after the model, too."""
    inputs, targets = batch
    scale = 1 + torch.rand(()).item()
    logits = model(inputs).flatten(0, 1)
    mean = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=0)
    return mean * (scale + torch.rand(()).item()), float((targets != 0).sum())


def mean_loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return charlm.loss(model, batch)


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 11, (SAMPLES, CONTEXT), generator=generator) for _ in range(2)]


def optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in parameters if parameter.requires_grad] or [torch.zeros(())]
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, foreach=False)
    return torch.optim.AdamW(parameters, lr=0.01, foreach=False)


def parts() -> schedule.Schedule:
    return schedule.Schedule(samples=SAMPLES, batch_size=BATCH, parts_per_step=1, seed=3, max_steps=STEPS)


def alone(
    options: Mapping[str, Any], *, name: str = "AdamW", microbatch: int = MICROBATCH, of: Any = loss
) -> dict[str, torch.Tensor]:
    """The state after all steps in one process."""
    whole = model(**options)
    chance = Chance(whole, seed=3, device=CPU)
    stepper = optimizer(name, whole.parameters())
    data = texts()
    for number in range(STEPS):
        part = parts().part(number)
        stepper.zero_grad()
        total = 0.0
        for micro, piece in enumerate(pipeline.micro_batches(part.samples, microbatch)):
            batch = [one[torch.tensor(part.indices[piece])] for one in data]
            chance.begin(part.index, micro)
            found = of(whole, batch)
            mean, weight = found if isinstance(found, tuple) else (found, float(len(batch[0])))
            total += weight
            (mean * (weight / part.batch_samples)).backward()
        for parameter in whole.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(part.batch_samples / total)
        stepper.step()
    return {key: value.detach().clone() for key, value in whole.state_dict().items()}


def on_mesh(
    options: Mapping[str, Any],
    *,
    stages: int = 1,
    shards: int = 1,
    order: Schedule = Schedule.GPIPE,
    name: str = "AdamW",
    microbatch: int = MICROBATCH,
    of: Any = loss,
) -> dict[str, torch.Tensor]:
    """The same, of this rank's stages; whole tensors where they are cut."""
    mesh = init_device_mesh("cpu", (stages, shards), mesh_dim_names=("pipeline", "tensor"))
    whole = model(**options)
    chance = Chance(whole, seed=3, device=CPU)
    run: Any = None
    if stages > 1:
        count = stages * pipeline.stages_per_rank(order)
        cut = pipeline.split(whole, count, config={}, by_user=None)
        mine = {number: cut[number] for number in range(mesh["pipeline"].get_local_rank(), count, stages)}
        pipeline.keep(whole, list(mine.values()))
        run = pipeline.Pipeline(
            mine,
            count=count,
            group=mesh["pipeline"].get_group(),
            schedule=order,
            microbatch=microbatch,
            loss=of,
            chance=chance,
            device=CPU,
        )
    if shards > 1:
        tensor.apply(whole, mesh["tensor"], config={}, by_user=None)
    stepper = optimizer(name, whole.parameters())
    data = texts()
    for number in range(STEPS):
        part = parts().part(number)
        batch = [one[torch.tensor(part.indices)] for one in data]
        stepper.zero_grad()
        if run is not None:
            mean, weight = run(batch, part)
        else:
            chance.begin(part.index, 0)
            found = of(whole, batch)
            mean, weight = found if isinstance(found, tuple) else (found, None)
            (mean * ((weight or part.samples) / part.batch_samples)).backward()
        for parameter in whole.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(part.batch_samples / (weight or part.samples))
        stepper.step()
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for key, value in whole.state_dict().items()
    }


class Wide(nn.Module):
    """Attention that asks how wide it is, and so cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        q, k, v = (
            one(hidden).view(batch, length, -1, width // self.heads).transpose(1, 2) for one in (self.q, self.k, self.v)
        )
        found: torch.Tensor = self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


def refusal_of_wide() -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    try:
        tensor.apply(nn.Sequential(Wide()), mesh, config={}, by_user=None)
    except WrongInput as error:
        return str(error)
    return ""


def difference(expected: Mapping[str, torch.Tensor], found: list[dict[str, torch.Tensor]]) -> float:
    """The largest over all tensors of all ranks, which together have all of them."""
    assert {key for state in found for key in state} == expected.keys()
    return max(
        (value.double() - expected[key].double()).abs().max().item() for state in found for key, value in state.items()
    )
