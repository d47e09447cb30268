"""What a rank of DataParallel gives to the sum of a step."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from configs import config_of
from disttrain_trainer.data.schedule import BatchPart, Schedule
from disttrain_trainer.loop.stopwatch import Stopwatch
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.strategies.all_reduce import AllReduce


class Sums:
    """The sums over the ranks; keeps the losses whose backward the other ranks wait for."""

    def __init__(self) -> None:
        self.begun: list[bool] = []

    def begin(self, loss: torch.Tensor, *, early: bool) -> None:
        self.begun.append(early)


def exchange_of(module: nn.Module, model: FlatModel, sums: Sums) -> AllReduce:
    """That of rank 0 of two, in a step of 4 samples."""
    schedule = Schedule(samples=4, batch_size=4, parts_per_step=2, seed=0, epochs=1)
    trainer = {"model": "m:m", "dataset": "m:d", "epochs": 1, "optimizer": {"name": "SGD", "learningRate": 0.1}}
    spec = {"strategy": {"type": "DataParallel"}, "trainer": trainer | {"batchSize": 4}, "worker": {"replicas": 2}}
    rank: Any = CollectiveMember()
    rank.step, rank.round = 0, Round(1)
    fakes: dict[str, Any] = {
        "process": SimpleNamespace(config=config_of(spec), rank=0),
        "loop": SimpleNamespace(stopwatch=Stopwatch({})),
        "task": SimpleNamespace(schedule=schedule, model=module, loading=None, learning_rate=None),
        "replica": sums,
    }
    nothing: Any = None
    return AllReduce(
        **fakes,
        metrics=nothing,
        control=nothing,
        member=rank,
        this_round=rank.round,
        model=model,
        optimizer=nothing,
        reshare=lambda: None,
        checkpoints=None,
    )


def compute(exchange: AllReduce, module: nn.Module, model: FlatModel, *, weight: float | None) -> torch.Tensor | None:
    """One part, as the loop computes it."""
    (assigned,) = exchange.next_parts()
    model.zero_grad()
    part = exchange.before(assigned)
    assert part is not None
    weighed = exchange.weigh(module(torch.ones(len(part.indices), 2)).sum(), part, weight)
    if weighed is not None:
        weighed.backward()  # type: ignore[no-untyped-call]
    exchange.after(part)
    return weighed


class WithSyncBatchNorm(nn.Module):
    """torch's SyncBatchNorm computes on a GPU only: it is there, and is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 1), nn.SyncBatchNorm(1)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(samples)
        return found


def test_where_the_model_needs_all_ranks_a_loss_of_weight_0_runs_backward_too_and_its_gradient_is_thrown_away() -> None:
    # Otherwise the collectives of the other ranks' backward would wait for this one's.
    module, sums = WithSyncBatchNorm(), Sums()
    model = FlatModel(module)
    assert compute(exchange_of(module, model, sums), module, model, weight=0.0) is not None
    assert sums.begun == [False]
    assert not any(vector.any() for vector in model.gradients())


def test_where_it_does_not_a_loss_of_weight_0_runs_no_backward() -> None:
    module, sums = nn.Linear(2, 1), Sums()
    model = FlatModel(module)
    assert compute(exchange_of(module, model, sums), module, model, weight=0.0) is None
    assert sums.begun == []


def test_a_rank_gives_its_share_of_the_steps_mean() -> None:
    module, sums = nn.Linear(2, 1), Sums()
    model = FlatModel(module)
    compute(exchange_of(module, model, sums), module, model, weight=None)
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad, torch.ones(1, 2))  # 2 of 4 samples, each of which adds 1
    assert sums.begun == [True]


def test_the_stand_in_of_a_rank_without_samples_leaves_no_gradient_and_no_buffer() -> None:
    module, sums = WithSyncBatchNorm(), Sums()
    module.linear.register_buffer("calls", torch.zeros(1))
    model = FlatModel(module)
    exchange = exchange_of(module, model, sums)
    (assigned,) = exchange.next_parts()
    empty = BatchPart(
        index=assigned.index, step=0, epoch=1, samples=0, batch_samples=4, indices=np.arange(0, dtype=np.int64)
    )
    stand_in = exchange.before(empty)
    assert stand_in is not None
    assert len(stand_in.indices) == 2
    module.linear.get_buffer("calls").add_(1)
    weighed = exchange.weigh(module(torch.ones(2, 2)).sum(), stand_in, None)
    assert weighed is not None
    weighed.backward()  # type: ignore[no-untyped-call]
    exchange.after(stand_in)
    assert not any(vector.any() for vector in model.gradients())
    assert not module.linear.get_buffer("calls").any()
