"""A small language model on a mesh, and the same in one process that computes the same parts and micro-batches in turn."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol
from unittest import mock

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from disttrain.api.mesh import AXES
from disttrain.api.strategy import ModelParallel, Schedule
from disttrain_trainer.data import schedule
from disttrain_trainer.data.chance import mix
from disttrain_trainer.data.inner_batches import inner_batches
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model import activations
from disttrain_trainer.model.blocks import blocks_of
from disttrain_trainer.parallel import fully_shard, micro_batches, pipeline, tensor
from disttrain_trainer.parallel import stages as pipeline_stages
from disttrain_trainer.parallel.chance import Chance
from disttrain_trainer.parallel.pipeline_forward import NeedsWholeModel, PipelineForward
from disttrain_trainer.parallel.shard_collectives import GatherByBroadcasts, ReduceByExchange
from training import mesh_users as users

STEPS, BATCH, SAMPLES = 20, 8, 43
MICROBATCH = 2
CPU = torch.device("cpu")


def optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in parameters if parameter.requires_grad] or [torch.zeros(())]
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, foreach=False)
    return torch.optim.AdamW(parameters, lr=0.01, foreach=False)


def parts(count: int = 1, steps: int = STEPS) -> schedule.Schedule:
    return schedule.Schedule(samples=SAMPLES, batch_size=BATCH, parts_per_step=count, seed=3, max_steps=steps)


class Stepper(Protocol):
    """A torch.optim.Optimizer, or one with a scheduler."""

    def zero_grad(self) -> None: ...

    def step(self) -> object: ...


def alone(
    options: Mapping[str, Any],
    *,
    name: str = "AdamW",
    microbatch: int | None = MICROBATCH,
    of: Any = users.loss,
    count: int = 1,
    steps: int = STEPS,
    clip: float = float("inf"),
    norms: list[float] | None = None,
    portions: int = 1,
    stepper_of: Callable[[nn.Module], Stepper] | None = None,
) -> dict[str, torch.Tensor]:
    """The state after all steps in one process that computes the `count` parts of a step in turn.

    microbatch: None where a part is computed whole, with the chance of a part. clip: the largest norm of a step's gradient. norms: gets
    those before the clip. portions: of each part, which starts from the buffers that the one before it left.
    stepper_of: default: the optimizer of this name.
    """
    whole = users.model(dict(options))
    chance = Chance(whole, seed=3, device=CPU) if microbatch is not None else None
    stepper: Stepper = stepper_of(whole) if stepper_of is not None else optimizer(name, whole.parameters())
    data = users.dataset({}, "train").tensors
    for step in range(steps):
        stepper.zero_grad()
        total = 0.0
        before = {key: value.clone() for key, value in whole.named_buffers()}
        left = before
        for number in range(count):
            part = parts(count, steps).part(step * count + number)
            if not part.samples:
                continue
            put(whole, before)
            pieces = [
                (portion, piece)
                for portion in inner_batches(part, portions, BATCH // count)
                for piece in micro_batches.slices(portion.samples, microbatch or BATCH + 1)
            ]
            for micro, (portion, piece) in enumerate(pieces):
                seed = mix(3, part.index)
                torch.manual_seed(mix(seed, portion.batch) if portion.batch else seed)
                batch = [one[torch.tensor(portion.indices[piece])] for one in data]
                if chance is not None:
                    chance.begin(part.index, micro)
                found = of(whole, batch)
                mean, weight = found if isinstance(found, tuple) else (found, float(len(batch[0])))
                total += weight
                (mean * weight).backward()
            if not number:
                left = {key: value.clone() for key, value in whole.named_buffers()}
        put(whole, left)
        for parameter in whole.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / total)
        norm = nn.utils.clip_grad_norm_(whole.parameters(), clip)
        if norms is not None:
            norms.append(float(norm))
        stepper.step()
    return {key: value.detach().clone() for key, value in whole.state_dict().items()}


def put(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    for key, value in model.named_buffers():
        value.copy_(buffers[key])


def on_mesh(
    options: Mapping[str, Any],
    *,
    stages: int = 1,
    shards: int = 1,
    order: Schedule = Schedule.GPIPE,
    name: str = "AdamW",
    microbatch: int = MICROBATCH,
    of: Any = users.loss,
    recomputes: bool = False,
) -> dict[str, torch.Tensor]:
    """The same, of this rank's stages; whole tensors where they are cut. recomputes: with activation checkpointing."""
    mesh = init_device_mesh("cpu", (stages, shards), mesh_dim_names=("pipeline", "tensor"))
    whole = users.model(dict(options))
    run: Any = None
    chance = None
    if stages > 1:
        chance = Chance(whole, seed=3, device=CPU)
        cut = ModelParallel(pipeline=stages, schedule=order)
        modules = pipeline_stages.split(whole, pipeline_stages.count(cut), config={}, by_user=None)
        mine = {number: modules[number] for number in pipeline_stages.of(cut, mesh["pipeline"].get_local_rank())}
        run = pipeline.Pipeline(
            mine,
            cut=cut,
            group=mesh["pipeline"].get_group(),
            microbatch=microbatch,
            loss=of,
            chance=chance,
            device=CPU,
        )
    if shards > 1:
        tensor.apply(whole, mesh["tensor"])
    if run is not None:
        pipeline_stages.keep(whole, run.modules)
    if recomputes:
        activations.recompute(blocks_of(whole), **({"replay": chance.replay} if chance is not None else {}))
    stepper = optimizer(name, whole.parameters())
    data = users.dataset({}, "train").tensors
    for number in range(STEPS):
        part = parts().part(number)
        batch = [one[torch.tensor(part.indices)] for one in data]
        stepper.zero_grad()
        if run is not None:
            run.begin(part)
            weight = run.weight_of_last(run(batch, part.samples)[1])
        else:
            torch.manual_seed(mix(3, part.index))
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


def collectives_of_steps(order: Schedule, *, idle: int | None) -> tuple[int, list[tuple[int, int]]]:
    """Two stages, each cut over two ranks: how many modules FSDP2 has wrapped here, and for each of two steps the gathers and sums of them.

    idle: a data rank that has no part.
    """
    mesh = init_device_mesh("cpu", (2, 1, 2, 1), mesh_dim_names=AXES)
    whole = users.model({})
    chance = Chance(whole, seed=3, device=CPU)
    cut = ModelParallel(pipeline=2, schedule=order)
    modules = pipeline_stages.split(whole, pipeline_stages.count(cut), config={}, by_user=None)
    mine = {number: modules[number] for number in pipeline_stages.of(cut, mesh["pipeline"].get_local_rank())}
    group = mesh["pipeline"].get_group()
    run = pipeline.Pipeline(mine, cut=cut, group=group, microbatch=2, loss=users.loss, chance=chance, device=CPU)
    pipeline_stages.keep(whole, run.modules)
    fully_shard.shard(whole, mesh, stages=run.modules)
    wrapped = sum(isinstance(module, FSDPModule) for stage in run.modules for module in stage.modules())
    data = users.dataset({}, "train").tensors
    found = []
    with (
        mock.patch.object(
            GatherByBroadcasts, "__call__", autospec=True, side_effect=GatherByBroadcasts.__call__
        ) as gathers,
        mock.patch.object(ReduceByExchange, "__call__", autospec=True, side_effect=ReduceByExchange.__call__) as sums,
    ):
        for number in range(2):
            part = parts().part(number)
            fully_shard.gather(run.modules)
            if mesh["shard"].get_local_rank() != idle:
                run.begin(part)
                run([one[torch.tensor(part.indices)] for one in data], part.samples)
            fully_shard.reduce(run.modules)
            found.append((gathers.call_count, sums.call_count))
            gathers.reset_mock()
            sums.reset_mock()
    return wrapped, found


def values_of_steps(order: Schedule) -> list[tuple[Any, float]]:
    """Two stages: of each step the named values that the last one knows, and the value over its whole batch."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
    whole = users.model({})
    chance = Chance(whole, seed=3, device=CPU)
    cut = ModelParallel(pipeline=2, schedule=order)
    modules = pipeline_stages.split(whole, pipeline_stages.count(cut), config={}, by_user=None)
    mine = {number: modules[number] for number in pipeline_stages.of(cut, mesh.get_local_rank())}

    def loss(model: nn.Module, batch: list[torch.Tensor]) -> Any:
        return users.mean_loss(model, batch), None, {"first": batch[0].double().mean()}

    run = pipeline.Pipeline(mine, cut=cut, group=mesh.get_group(), microbatch=3, loss=loss, chance=chance, device=CPU)
    data = users.dataset({}, "train").tensors
    found = []
    for number in range(2):
        part = parts().part(number)
        batch = [one[torch.tensor(part.indices)] for one in data]
        run.begin(part)
        run(batch, part.samples)
        found.append((run.values, float(batch[0].double().mean())))
    return found


class Nested(nn.Module):
    """A last stage that returns more than a tensor."""

    def __init__(self, last: Any = None) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 2), last

    def forward(self, hidden: torch.Tensor, scale: torch.Tensor) -> Any:
        found = self.layer(hidden) * scale
        return {"logits": found, "more": [(found.argmax(-1), None), found[:0], "text", 3], "last": self.last}


class Pair(nn.Module):
    def forward(self, hidden: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        torch.rand(())  # which must not change what comes after the call
        return hidden.tanh(), torch.tensor(scale)


def answers(last: Any = None) -> tuple[Any, Any, bool]:
    """What the forward of a pipeline gives, what one process does, and whether both draw the same afterwards."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
    torch.manual_seed(0)
    modules = [Pair(), Nested(last)]
    rank = mesh.get_local_rank()
    cut = ModelParallel(pipeline=2)
    run = PipelineForward({rank: modules[rank]}, cut=cut, group=mesh.get_group(), device=CPU)
    batch, before = torch.randn(4, 3), torch.get_rng_state()
    try:
        with torch.no_grad():
            found: Any = run(batch, scale=2.0)
    except NeedsWholeModel as error:
        found = str(error)
    undisturbed = torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        return found, modules[1](*modules[0](batch, 2.0)), undisturbed


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
        tensor.apply(nn.Sequential(Wide()), mesh)
    except WrongInput as error:
        return str(error)
    return ""


def difference(expected: Mapping[str, torch.Tensor], found: list[dict[str, torch.Tensor]]) -> float:
    """The largest over all tensors of all ranks, which together have all of them."""
    assert {key for state in found for key in state} ^ expected.keys() == set()
    return max(
        (value.double() - expected[key].double()).abs().max().item() for state in found for key, value in state.items()
    )
