"""How the blocks of a model are computed: again in backward, compiled, and with the same result either way."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.api.trainer import Trainer
from disttrain_trainer.model import activations, compilation, forward_options
from disttrain_trainer.model.blocks import blocks_of
from disttrain_trainer.parallel.chance import Chance

CPU = torch.device("cpu")


class Counting(nn.Module):
    """A buffer that its output depends on, which each forward changes in place, and another that it puts a new tensor into."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.layer, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(6))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.drop(self.norm(self.layer(x)).tanh()) * (self.scale + torch.rand(())) - self.mean
        self.scale += 0.5
        self.mean = self.mean.lerp(x.detach().mean(0), 0.5)
        return x


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Counting(), Counting())


def learned(
    change: Callable[[nn.Sequential], Any], *, with_chance: bool = False
) -> tuple[nn.Sequential, list[torch.Tensor]]:
    """The model and its gradients after the forwards of two micro-batches and then their backwards."""
    made = model()
    chance = Chance(made, seed=3, device=CPU) if with_chance else None
    activations_of = change(made)
    if activations_of == "recompute":
        activations.recompute(list(made), **({"replay": chance.replay} if chance is not None else {}))
    generator = torch.Generator().manual_seed(1)
    losses = []
    for number in range(2):
        torch.manual_seed(number)
        if chance is not None:
            chance.begin(0, number)
        losses.append(made(torch.randn(5, 6, generator=generator)).square().sum())
    for loss in losses:
        loss.backward()
    after = torch.rand(())
    return made, [*(p.grad for p in made.parameters() if p.grad is not None), after]


@pytest.mark.parametrize("with_chance", [False, True], ids=["one generator", "keyed by module"])
def test_a_block_that_is_computed_again_has_the_same_gradients_buffers_and_chance(with_chance: bool) -> None:
    expected, gradients = learned(lambda made: None, with_chance=with_chance)
    made, found = learned(lambda made: "recompute", with_chance=with_chance)
    assert [block.calls for block in expected] == [2, 2]
    assert [block.calls for block in made] == [4, 4]
    assert all(torch.equal(a, b) for a, b in zip(gradients, found, strict=True))
    assert made.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(made.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_an_evaluation_computes_nothing_again() -> None:
    made = model()
    activations.recompute(list(made))
    with torch.no_grad():
        made(torch.randn(5, 6))
    assert [block.calls for block in made] == [1, 1]


def test_forward_keeps_only_what_goes_into_a_block() -> None:
    def kept(made: nn.Module) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            made(torch.randn(5, 6))
        return sum(sizes)

    recomputed = model()
    activations.recompute(list(recomputed))
    assert kept(recomputed) < kept(model()) / 4


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own look, which it hides
@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_blocks_compute_the_same(recomputes: bool) -> None:
    def change(made: nn.Sequential) -> None:
        if recomputes:
            activations.recompute(list(made))
        compilation.compile_blocks(list(made), backend="eager")

    _, expected = learned(lambda made: None)
    _, found = learned(change)
    assert all(torch.allclose(a, b) for a, b in zip(expected, found, strict=True))


def trainer(**fields: Any) -> Trainer:
    body = {"model": "m:m", "dataset": "m:d", "optimizer": {"name": "SGD", "learningRate": 0.1}, "epochs": 1}
    return Trainer.model_validate(body | fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"activationCheckpointing": True}, "trainer.activationCheckpointing changes nothing"),
        ({"activationCheckpointing": True, "compile": True}, "trainer.activationCheckpointing and compile change"),
    ],
)
def test_a_model_without_blocks_is_said_to_have_none(
    caplog: pytest.LogCaptureFixture, fields: dict[str, Any], says: str
) -> None:
    with caplog.at_level(logging.WARNING):
        forward_options.apply(nn.Linear(2, 2), trainer(**fields))
    assert [record.getMessage().startswith(says) for record in caplog.records] == [True]


def test_without_a_compiler_the_log_says_so_and_the_model_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    made = model()
    with caplog.at_level(logging.WARNING):
        forward_options.apply(made, trainer(compile=True))
    assert [record.getMessage() for record in caplog.records] == [
        "trainer.compile: the model is not compiled: there is no C++ compiler (CXX, c++, g++, clang++)"
    ]
    assert all("forward" not in vars(block) for block in made)


def test_tied_blocks_are_left_as_they_are() -> None:
    made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    made[2].weight = made[0].weight
    assert blocks_of(made) == [made[1]]
