"""trainer.precision: what is computed in bfloat16, and what stays float32."""

from typing import Any

import pytest
import torch
from torch import nn

from configs import config_of
from disttrain.api.precision import Precision
from disttrain_trainer.checkpoint import resuming
from disttrain_trainer.model.activations import recompute
from disttrain_trainer.model.compilation import compile_blocks
from disttrain_trainer.model.objective import Objective, cross_entropy
from disttrain_trainer.model.precision import Autocast

CPU = torch.device("cpu")
HALF = Autocast(Precision.BFLOAT16, CPU)
BATCH = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        normed = self.norm(hidden)
        self.seen += [hidden.dtype, normed.dtype]
        found: torch.Tensor = self.head(normed.tanh())
        return found


def test_products_are_bfloat16_and_the_loss_and_gradients_float32() -> None:
    model = Net()
    loss, _ = Objective(model, HALF.loss(cross_entropy))(BATCH, 8)
    assert loss.dtype is torch.float32
    loss.backward()
    assert torch.bfloat16 in model.seen
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())
    exact = Net()
    Objective(exact, cross_entropy)(BATCH, 8)[0].backward()
    for half, whole in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(half.grad, whole.grad, atol=0.02, rtol=0.1)


def test_a_loss_that_is_a_half_itself_is_made_whole_with_its_weight() -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        return model(batch[0])[0, 0], 5, {"mean": model(batch[0])[0, 0]}

    objective = Objective(Net(), HALF.loss(loss))
    mean, weight = objective(BATCH, 8)
    assert (mean.dtype, weight) == (torch.float32, 5)
    assert float((objective.values or {})["mean"]) == mean.item()


def test_float32_leaves_the_function_as_it_is() -> None:
    assert Autocast(Precision.FLOAT32, CPU).loss(cross_entropy) is cross_entropy


def test_a_forward_without_gradients_takes_none_from_the_one_after_it() -> None:
    """As of a teacher: torch's cache of parameters that were cast would keep what was cast without a graph."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            target = model(batch[0])
        return (model(batch[0]) - 0.5 * target).square().mean()

    model = Net()
    Objective(model, HALF.loss(loss))(BATCH, 8)[0].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own look, which it hides
@pytest.mark.parametrize("compiles", [False, True])
def test_what_backward_computes_again_is_computed_in_the_same_precision(compiles: bool) -> None:
    gradients = []
    for again in (False, True):
        model = Net()
        if again:
            recompute([model.body, model.head])
            if compiles:
                compile_blocks([model.body, model.head], backend="eager")
        Objective(model, HALF.loss(cross_entropy))(BATCH, 8)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_an_evaluation_gets_float32_from_the_model() -> None:
    model = Net()
    with torch.no_grad(), HALF.evaluating(model):
        found = model(BATCH[0])
    assert torch.bfloat16 in model.seen
    assert found.numpy().dtype == "float32"
    assert model.head(torch.zeros(1, 6)).dtype is torch.float32


@pytest.mark.parametrize(("double", "said"), [(True, "BFloat16 changes nothing"), (False, "")])
def test_a_model_of_float64_is_said_to_stay_as_it_is(caplog: pytest.LogCaptureFixture, double: bool, said: str) -> None:
    HALF.check(Net().double() if double else Net())
    assert said in caplog.text
    assert bool(caplog.records) is double


def test_a_training_goes_on_in_another_precision() -> None:
    names = {"model": "m:m", "dataset": "m:d", "optimizer": {"name": "SGD", "learningRate": 0.1}, "epochs": 1}
    whole, half = (
        config_of({"strategy": {"type": "DataParallel"}, "worker": {"replicas": 1}, "trainer": names | more})
        for more in ({}, {"precision": "BFloat16"})
    )
    assert resuming.misfit(resuming.state_of(whole), resuming.state_of(half)) is None
    assert resuming.misfit(resuming.data_of(whole, None), resuming.data_of(half, None)) is None
    (change,) = resuming.changes(resuming.record_of(whole), resuming.record_of(half))
    assert change.startswith("trainer.precision: ")
