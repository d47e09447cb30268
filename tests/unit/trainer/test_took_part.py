"""A parameter without a gradient is left alone, as torch.optim leaves one whose grad is None: value, momentum, decay and count of steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.api.optimizer import Optimizer as Settings
from disttrain_trainer.checkpoint.background import HostCopy
from disttrain_trainer.errors import UserError, WrongInput
from disttrain_trainer.model.flat import FlatModel, Layout, runs_of
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.parallel.state import RankState
from disttrain_trainer.parameter_server import participation, shard
from disttrain_trainer.parameter_server.optimizer import Optimizer
from disttrain_trainer.parameter_server.shard import Shard
from disttrain_trainer.parameter_server.shard_file import ShardFile

ADAM = {"name": "Adam", "learningRate": 0.1, "weightDecay": 0.3}
CASES = [
    pytest.param({"name": "SGD", "learningRate": 0.1, "weightDecay": 0.3}, torch.optim.SGD, {}, id="SGD"),
    pytest.param(
        {"name": "SGD", "learningRate": 0.1, "weightDecay": 0.3, "momentum": 0.9},
        torch.optim.SGD,
        {"momentum": 0.9},
        id="momentum",
    ),
    pytest.param(ADAM, torch.optim.Adam, {}, id="Adam"),
    pytest.param({**ADAM, "name": "AdamW"}, torch.optim.AdamW, {}, id="AdamW"),
]
STEPS = 12


def make_model(dtype: torch.dtype = torch.float64) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    # The third one fills a block of a server.
    return nn.ParameterList([torch.randn(length, generator=generator, dtype=dtype) for length in (70, 70, 300, 70)])


def used_in(step: int) -> list[int]:
    """Parameter 3 is never used, 1 sometimes, and in one step none is."""
    return [] if step == 5 else [0, 2] if step % 3 else [0, 1, 2]


def loss_of(model: nn.ParameterList, step: int) -> torch.Tensor:
    return sum(((model[number] - step).square().sum() for number in used_in(step)), start=torch.zeros(()))


def trained_by_torch(optimizer: Any, settings: dict[str, Any]) -> list[torch.Tensor]:
    model = make_model()
    stepper = optimizer(model.parameters(), lr=0.1, weight_decay=0.3, **settings)
    for step in range(STEPS):
        stepper.zero_grad()
        if used_in(step):
            loss_of(model, step).backward()
        stepper.step()
    return [parameter.detach() for parameter in model]


def steps_of(flat: FlatModel, model: nn.ParameterList) -> Iterator[int]:
    for step in range(STEPS):
        flat.zero_grad()
        if used_in(step):
            loss_of(model, step).backward()
        flat.gradients()
        yield step


@pytest.mark.parametrize(("settings", "optimizer", "more"), CASES)
def test_a_rank_leaves_alone_what_took_no_part_also_through_a_resume(
    settings: dict[str, str], optimizer: Any, more: dict[str, float], tmp_path: Path
) -> None:
    model = make_model()
    flat = FlatModel(model)
    ours = FlatOptimizer(Settings.model_validate(settings), flat)
    for step in steps_of(flat, model):
        ours.step(flat.gradients(), flat.took_part)
        if step in (4, 8):
            state = RankState(model, ours)
            state.write(tmp_path / "state", state.present())
            ours = FlatOptimizer(Settings.model_validate(settings), flat)
            RankState(model, ours).load(tmp_path / "state")
    for found, expected in zip(model, trained_by_torch(optimizer, more), strict=True):
        torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize(("settings", "optimizer", "more"), CASES)
def test_a_server_leaves_alone_what_took_no_part_also_through_a_checkpoint(
    settings: dict[str, str],
    optimizer: Any,
    more: dict[str, float],
    servers: int,
    history: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard, "BLOCK", 128)
    model = make_model()
    flat = FlatModel(model)

    def make(server: int) -> Shard:
        return Shard(
            layout=flat.layout,
            server=server,
            servers=servers,
            optimizer=Optimizer(Settings.model_validate(settings)),
            history=history,
        )

    shards = [make(server) for server in range(servers)]
    for each in shards:
        values = each.take()
        (span,) = each.spans
        values.parts[0][: span.length] = flat.parameters[0][span.start : span.stop]
        each.initialize(values)
    for step in steps_of(flat, model):
        took = flat.took_part
        runs = None if took is None else runs_of(flat.places, took)
        for number, each in enumerate(shards):
            (span,) = each.spans
            buffers = each.take()
            buffers.parts[0][: span.length] = flat.gradients()[0][span.start : span.stop]
            ours = None if runs is None else participation.within(runs, [(span.start, span.stop)])
            part = None if ours is None else participation.took_of(ours, [span.length])
            each.hold(0, buffers, 1.0)
            each.absorb([], update=0, took=part)
            flat.parameters[0][span.start : span.stop] = each.acquire(None).parts[0][: span.length]
            if step == 6:
                from disttrain_trainer.data.index_set import IndexSet

                each.snapshot(IndexSet(), HostCopy()).save(tmp_path / f"{number}")
                shards[number] = make(number)
                shards[number].restore(ShardFile.load(tmp_path / f"{number}"))
    for found, expected in zip(model, trained_by_torch(optimizer, more), strict=True):
        torch.testing.assert_close(found.detach(), expected)


def test_what_took_part_on_any_worker_takes_part_and_misses_are_counted() -> None:
    lengths = [10, 4]
    one = participation.took_of([(0, 0, 3), (0, 5, 7)], lengths)
    other = participation.took_of([(0, 2, 5), (1, 0, 4)], lengths)
    assert participation.union(one, other, lengths) == (((0, 7),), ((0, 4),))
    assert participation.union(one, None, lengths) is None
    assert participation.took_of([(0, 0, 10), (1, 0, 4)], lengths) is None
    missed = participation.after((), [(0, 3)], 10)
    missed = participation.after(missed, [(0, 5)], 10)
    assert missed == ((3, 5, 1), (5, 10, 2))
    assert participation.to_update(missed, [(2, 6)], 10) == [(2, 3, 0), (3, 5, 1), (5, 6, 2)]
    for wrong in [(0, 3, 3), (0, 5, 11), (2, 0, 1)]:
        with pytest.raises(ValueError, match="not of this shard"):
            participation.took_of([wrong], lengths)


class Grown(nn.Module):
    """Some parameters, all of which may be frozen, replaced or given other memory later."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.body.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.body.weight.requires_grad_(True), r"parameter body\.weight was frozen"),
        (lambda m: setattr(m, "head", nn.Linear(2, 1)), r"parameter head\.weight was added or replaced"),
        (lambda m: m.add_module("more", nn.Linear(1, 1)), r"parameter more\.weight was added or replaced"),
        (lambda m: setattr(m, "head", None), r"parameter head\.weight was removed"),
        (lambda m: setattr(m.head.bias, "data", torch.zeros(1)), r"parameter head\.bias was given other memory"),
        (lambda m: m.double(), r"parameter body\.bias was given other memory"),
    ],
    ids=["unfrozen", "replaced", "added", "removed", "data", "dtype"],
)
def test_a_model_that_changes_in_training_is_refused_by_name(change: Any, said: str) -> None:
    model = Grown()
    flat = FlatModel(model)
    flat.verify()
    flat.refuse_unfrozen()
    change(model)
    with pytest.raises(UserError, match=said):  # noqa: PT012 - either of the two
        flat.refuse_unfrozen()
        flat.verify()


def test_a_parameter_that_is_frozen_later_takes_no_part() -> None:
    model = nn.Linear(2, 1)
    flat = FlatModel(model)
    model.bias.requires_grad_(False)
    flat.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    flat.gradients()
    assert flat.took_part == [True, False]


def test_sparse_gradients_and_those_that_user_code_replaced_count() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(3, 2, sparse=True), "idle": nn.Linear(2, 2)})
    flat = FlatModel(model)
    for throw_away in (False, True):
        flat.zero_grad()
        if throw_away:
            model.zero_grad()
        model["table"](torch.tensor([1, 1])).sum().backward()
        for _ in range(2):  # asked twice is the same as once
            assert flat.gradients()[0][:6].tolist() == [0, 0, 2, 2, 0, 0]
            assert flat.took_part == [True, False, False]


@pytest.mark.parametrize("before", [lambda _: None, lambda model: model.zero_grad()], ids=["as it is", "cleared"])
def test_a_loss_that_calls_backward_itself_is_refused_also_where_the_graph_stays(before: Any) -> None:
    model = nn.Linear(2, 1)
    flat = FlatModel(model)
    flat.zero_grad()
    before(model)
    loss = model(torch.ones(1, 2)).sum()
    flat.refuse_own_backward()
    loss.backward(retain_graph=True)
    with pytest.raises(UserError, match=r"^trainer\.loss calls backward\(\) itself, as it seems: parameter weight has"):
        flat.refuse_own_backward()
    model.zero_grad(set_to_none=False)  # as after a penalty of its own
    flat.refuse_own_backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_counts_of_steps_do_not_depend_on_the_default_type_that_user_code_chose(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    optimizer = FlatOptimizer(Settings.model_validate(ADAM), FlatModel(nn.Linear(2, 2)))
    torch.set_default_dtype(dtype)
    try:
        optimizer.restore([torch.tensor([4097.0, 5.0], dtype=torch.float32)])
        [counts] = optimizer.state()["updates"]
    finally:
        torch.set_default_dtype(before)
    assert (counts.dtype, counts.tolist()) == (torch.float32, [4097, 5])


def test_channels_last_weights_keep_their_strides_and_are_another_layout() -> None:
    model = nn.Conv2d(3, 4, 2)
    plain = Layout.of(model).digest
    before = model.weight.detach().clone()
    model.to(memory_format=torch.channels_last)
    strides = model.weight.stride()
    flat = FlatModel(model)
    assert (model.weight.stride(), model.weight.grad.stride()) == (strides, strides)
    assert torch.equal(model.weight, before)
    assert flat.layout.digest != plain
    flat.parameters[0].zero_()
    assert not model.weight.any()


def test_a_type_whose_parameters_have_no_elements_is_left_out() -> None:
    model = nn.ParameterList([torch.ones(3), torch.zeros(0, dtype=torch.float64)])
    flat = FlatModel(model)
    assert [vector.dtype for vector in flat.layout.vectors] == ["float32"]
    with pytest.raises(WrongInput, match="no trainable parameter"):
        FlatModel(nn.ParameterList([torch.zeros(0)]))
