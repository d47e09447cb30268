"""Which step's state a rank of DataParallel holds, when the rank that gives it is lost on the way; and which state it takes from a file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.api.optimizer import Optimizer as Settings
from disttrain_trainer.errors import PeerLost, WrongInput
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.state import RankState
from disttrain_trainer.strategies.collective import take_newest


def take_over(rank: CollectiveMember, *, number: int, broadcast: Any) -> None:
    """A rank gets the state of rank 1 by `broadcast`."""
    state: Any = SimpleNamespace(broadcast=broadcast)
    take_newest(rank, Round(2, source=1), state=state, own=number, device=torch.device("cpu"))


def rank_at(step: int) -> CollectiveMember:
    rank = CollectiveMember()
    rank.step = step
    return rank


def breaking(**_: Any) -> int:
    raise BrokenGroup(RuntimeError("closed by peer"))


@pytest.mark.parametrize(("number", "left"), [(0, -1), (1, 40)], ids=["who takes it over", "who gives it"])
def test_a_rank_that_has_half_of_a_state_says_that_it_has_none_and_the_one_that_gives_it_keeps_its_own(
    number: int, left: int
) -> None:
    rank = rank_at(40)
    with pytest.raises(BrokenGroup):
        take_over(rank, number=number, broadcast=breaking)
    assert rank.step == left


def test_a_rank_that_has_taken_a_state_over_is_at_its_step() -> None:
    rank = rank_at(-1)
    take_over(rank, number=0, broadcast=lambda **_: 41)
    assert rank.step == 41


def test_a_source_without_a_state_is_refused() -> None:
    with pytest.raises(PeerLost, match="worker-1: it has no whole state to give"):
        take_over(rank_at(3), number=0, broadcast=lambda **_: -1)


def test_a_rank_that_is_left_alone_with_half_of_a_state_goes_on_as_a_new_process() -> None:
    rank = rank_at(40)
    with pytest.raises(BrokenGroup):
        take_over(rank, number=0, broadcast=breaking)
    with pytest.raises(PeerLost, match="worker-0: it has no whole state to give"):
        take_newest(rank, Round(3, source=0, members=(0,)), state=None, own=0, device=torch.device("cpu"))


def test_a_rank_that_is_left_alone_keeps_its_whole_state() -> None:
    rank = rank_at(40)
    take_newest(rank, Round(3, source=0, members=(0,)), state=None, own=0, device=torch.device("cpu"))
    assert rank.step == 40


def state_of(*, frozen: list[int], momentum: float = 0.9) -> tuple[nn.Module, RankState]:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    for number in frozen:
        model[number].requires_grad_(False)
    flat = FlatModel(model)
    settings = Settings.model_validate({"name": "SGD", "learningRate": 0.1, "momentum": momentum})
    return model, RankState(model, FlatOptimizer(settings, flat), flat.described())


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ([0, 1], [0], "parameter 1.bias is frozen there, trained (requires_grad) here"),
        ([0], [0, 1], "parameter 1.bias is trained there, frozen (requires_grad) here"),
        ([0], [1], "parameter 0.bias is frozen there, trained (requires_grad) here"),
    ],
    ids=["unfrozen", "frozen", "another part of the same size"],
)
def test_a_checkpoint_of_which_other_parameters_were_trained_is_refused_by_name(
    tmp_path: Path, then: list[int], now: list[int], said: str
) -> None:
    file = tmp_path / "state.safetensors"
    _, saved = state_of(frozen=then)
    saved.write(file, saved.present())
    model, state = state_of(frozen=now)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(WrongInput) as raised:
        state.load(file)
    assert said in str(raised.value)
    assert all(map(torch.equal, before, model.parameters()))
    assert saved.layout != state.layout, "nor do two such ranks train with one another"


def moments_of(model: nn.Module) -> RankState:
    flat = FlatModel(model)
    settings = Settings.model_validate({"name": "Adam", "learningRate": 0.1})
    return RankState(model, FlatOptimizer(settings, flat), flat.described())


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (
            nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}),
            nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)}),
        ),
        (nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)),
    ],
    ids=["order", "memory format"],
)
def test_a_checkpoint_in_which_parameters_lie_elsewhere_is_refused(
    tmp_path: Path, then: nn.Module, now: nn.Module
) -> None:
    saved = moments_of(then)
    saved.write(tmp_path / "state.safetensors", saved.present())
    with pytest.raises(WrongInput, match=r"parameter (b\.)?weight has another place or memory format"):
        moments_of(now).load(tmp_path / "state.safetensors")


def test_a_checkpoint_of_other_names_is_of_another_model(tmp_path: Path) -> None:
    saved = moments_of(nn.Sequential(nn.Linear(2, 2)))
    saved.write(tmp_path / "state.safetensors", saved.present())
    with pytest.raises(WrongInput, match=r"is of another model: model\.0\.0\.weight is missing there"):
        moments_of(nn.Sequential(nn.Sequential(nn.Linear(2, 2)))).load(tmp_path / "state.safetensors")


def test_a_checkpoint_of_which_the_same_parameters_were_trained_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    model, saved = state_of(frozen=[1])
    saved.write(file, saved.present())
    other, state = state_of(frozen=[1])
    state.load(file)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
