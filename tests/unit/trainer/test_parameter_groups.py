"""trainer.optimizer.groups: which parameters are in which group, and that each is trained by the numbers of its group."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.api.optimizer import Optimizer as Settings
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.model.parameter_groups import Groups, check, covers, group_of, groups_of, within
from disttrain_trainer.parameter_server import shard as shards
from disttrain_trainer.parameter_server.optimizer import Optimizer
from disttrain_trainer.parameter_server.participation import took_of
from disttrain_trainer.parameter_server.participation import within as runs_within
from disttrain_trainer.parameter_server.shard import Shard

GROUPS = [{"match": "(bias|norm)", "weightDecay": 0}, {"match": "^head", "learningRate": 0.001}]
SGD = {"name": "SGD", "learningRate": 0.1, "weightDecay": 0.2}
RULES: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
    (SGD, torch.optim.SGD, {}),
    ({**SGD, "momentum": 0.9, "nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ({**SGD, "name": "Adam"}, torch.optim.Adam, {}),
    ({**SGD, "name": "AdamW"}, torch.optim.AdamW, {}),
]
STEPS = 5


def settings_of(groups: Sequence[dict[str, Any]] = GROUPS, **settings: Any) -> Settings:
    return Settings.model_validate({**SGD, **settings, "groups": groups})


class Net(nn.Module):
    """Groups of some elements and of many, with ends in the middle of paddings and of blocks."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.norm, self.head = nn.Linear(37, 21), nn.LayerNorm(21), nn.Linear(21, 3)
        self.to(dtype)


def gradients_of(flat: FlatModel, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(len(flat.parameters[0]), generator=generator, dtype=torch.float64).to(flat.parameters[0].dtype)


def took_part_in(step: int, flat: FlatModel) -> list[bool] | None:
    """In the third step, not the head's bias nor the norm's weight."""
    return [place.name not in ("head.bias", "norm.weight") for place in flat.places] if step == 2 else None


def by_torch(kind: Any, more: dict[str, Any]) -> torch.Tensor:
    model = Net()
    flat = FlatModel(model)
    settings = settings_of()
    numbers: list[dict[str, float]] = [{}, {"weight_decay": 0}, {"lr": 0.001}]
    groups = [
        {"params": [p for n, p in model.named_parameters() if group_of(settings, n) == group], **changes}
        for group, changes in enumerate(numbers)
    ]
    optimizer = kind(groups, lr=0.1, weight_decay=0.2, **more)
    for step in range(STEPS):
        whole, took = gradients_of(flat, step), took_part_in(step, flat)
        for number, (place, parameter) in enumerate(zip(flat.places, flat.trained, strict=True)):
            gradient = whole[place.start : place.stop].view_as(parameter).clone()
            parameter.grad = gradient if took is None or took[number] else None
        optimizer.step()
    return flat.parameters[0].clone()


def test_the_first_match_wins_and_the_rest_is_in_no_group() -> None:
    settings = settings_of()
    names = ["head.bias", "head.weight", "norm.weight", "body.weight", "overhead.weight"]
    assert [group_of(settings, name) for name in names] == [1, 2, 1, 0, 0]


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (
            "nrom",
            r"trainer\.optimizer\.groups\[1\]\.match: 'nrom' matches no parameter of the model, whose names are body\.w",
        ),
        ("(bias", r"trainer\.optimizer\.groups\[1\]\.match: '\(bias' is no regular expression: missing \)"),
    ],
)
def test_a_match_without_a_parameter_or_without_a_meaning_is_refused_by_its_place(match: str, message: str) -> None:
    names = [name for name, _ in Net().named_parameters()]
    check(settings_of(), names)
    with pytest.raises(WrongInput, match=message):
        check(settings_of([GROUPS[0], {"match": match, "weightDecay": 0}]), names)


def test_a_group_of_frozen_parameters_is_one() -> None:
    model = Net()
    model.head.requires_grad_(False)
    check(settings_of(), [name for name, _ in model.named_parameters()])
    assert {group for runs in groups_of(settings_of(), FlatModel(model).places) for _, group in runs} == {0, 1}


def test_neighbours_of_one_group_are_one_run_and_cover_the_layout() -> None:
    flat = FlatModel(Net())
    (runs,) = groups = groups_of(settings_of(), flat.places)
    assert runs == ((777, 0), (777 + 21 + 42, 1), (777 + 63 + 63, 2), (777 + 63 + 66, 1))
    assert covers(groups, lengths=[906], count=3)
    assert within(groups, vector=0, start=770, stop=800) == ((0, 7, 0), (7, 30, 1))
    assert within((), vector=0, start=770, stop=800) == ((0, 30, 0),)


@pytest.mark.parametrize(
    "groups",
    [
        (((906, 3),),),
        (((905, 0),),),
        (((907, 0),),),
        (((9, 0), (9, 1), (906, 0)),),
        (((10, 0), (9, 1), (906, 0)),),
        ((),),
        (((906, 0),), ()),
    ],
)
def test_groups_of_a_stranger_are_not_those_of_a_layout(groups: Groups) -> None:
    assert not covers(groups, lengths=[906], count=3)


@pytest.mark.parametrize(("settings", "kind", "more"), RULES)
def test_a_rank_trains_each_group_as_torch_does(settings: dict[str, Any], kind: Any, more: dict[str, Any]) -> None:
    flat = FlatModel(Net())
    ours = FlatOptimizer(settings_of(**settings), flat)
    for step in range(STEPS):
        ours.step((gradients_of(flat, step),), took_part_in(step, flat))
    torch.testing.assert_close(flat.parameters[0], by_torch(kind, more), rtol=0, atol=1e-14)


def by_servers(settings: Settings, *, servers: int, history: bool, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    flat = FlatModel(Net(dtype))
    found = []
    for server in range(servers):
        shard = Shard(
            layout=flat.layout, server=server, servers=servers, optimizer=Optimizer(settings), history=history
        )
        shard.assign(groups_of(settings, flat.places))
        (span,) = shard.spans
        values = shard.take()
        values.parts[0][: span.length] = flat.parameters[0][span.start : span.stop]
        shard.initialize(values)
        for step in range(STEPS):
            took_part = took_part_in(step, flat)
            took = None
            if took_part is not None:
                runs = [(0, p.start, p.stop) for p, took in zip(flat.places, took_part, strict=True) if took]
                took = took_of(runs_within(runs, [(span.start, span.stop)]), [span.length])
            gradient = shard.take()
            gradient.parts[0][: span.length] = gradients_of(flat, step)[span.start : span.stop]
            shard.hold(step, gradient, 1.0)
            shard.absorb((), update=step, took=took)
        buffers = shard.acquire(None)
        found.append(buffers.parts[0][: span.length].clone())
    return torch.cat(found)


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize(("settings", "kind", "more"), RULES)
def test_servers_train_each_group_as_torch_does_and_a_cut_changes_no_bit(
    settings: dict[str, Any], kind: Any, more: dict[str, Any], history: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK", 256)
    ours = settings_of(**settings)
    one, *others = [by_servers(ours, servers=servers, history=history) for servers in (1, 2, 3)]
    torch.testing.assert_close(one, by_torch(kind, more), rtol=0, atol=1e-14)
    assert all(torch.equal(one, other) for other in others)


def test_parameters_of_16_bits_are_trained_by_groups_in_32() -> None:
    ours = settings_of(**SGD)
    one, *others = [by_servers(ours, servers=servers, history=True, dtype=torch.bfloat16) for servers in (1, 2, 3)]
    expected = by_torch(torch.optim.SGD, {})
    assert (one.double() - expected).abs().max() < 0.1
    assert all(torch.equal(one, other) for other in others)


def test_a_shard_refuses_groups_of_another_layout() -> None:
    flat = FlatModel(Net())
    shard = Shard(layout=flat.layout, server=0, servers=1, optimizer=Optimizer(settings_of()), history=True)
    with pytest.raises(WrongInput, match="groups are not those"):
        shard.assign((((905, 0),),))
    with pytest.raises(WrongInput, match="groups are not those"):
        shard.assign(())
