"""What is said of a loss that cannot be trained with: the job's fields, and the line of the user."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain_trainer.errors import UserError, WrongInput
from disttrain_trainer.model.flat import Layout
from disttrain_trainer.model.objective import IDLE_STEPS, MOST_WEIGHTLESS, Loss, Objective
from disttrain_trainer.strategies.all_reduce import copies_of_buffers, put_back

MODEL = nn.Linear(2, 1)


def mean(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(batch).square().mean()
    return loss


def detached(model: nn.Module, batch: Any) -> torch.Tensor:
    return mean(model, batch).detach()


def of_a_number(model: nn.Module, batch: Any) -> torch.Tensor:
    return torch.tensor(mean(model, batch).item())


def under_no_grad(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return mean(model, batch)


def without_the_model(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = batch.sum()
    return loss


@pytest.mark.parametrize("loss", [detached, of_a_number, under_no_grad, without_the_model])
def test_a_loss_without_a_graph_names_the_field_and_the_users_function(loss: Loss) -> None:
    with pytest.raises(UserError) as raised:
        Objective(MODEL, loss)(torch.ones(3, 2), 3)
    assert str(raised.value).startswith(
        "trainer.loss returned a loss that no parameter of trainer.model can learn from"
    )
    assert f"({Path(__file__)}:{loss.__code__.co_firstlineno})" in str(raised.value)


def test_a_loss_with_a_graph_is_taken() -> None:
    loss, weight = Objective(MODEL, mean)(torch.ones(3, 2), 3)
    assert loss.requires_grad
    assert weight is None


def test_batch_norm_on_one_sample_names_the_batch_size_and_the_users_line() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(UserError) as raised:
        Objective(model, mean)(torch.ones(1, 2), 1)
    assert str(raised.value).startswith("trainer.batchSize: BatchNorm cannot train on the one sample")
    assert f"({Path(__file__)}:{mean.__code__.co_firstlineno + 1})" in str(raised.value)


def test_another_mistake_of_the_users_passes_through() -> None:
    def broken(model: nn.Module, batch: Any) -> torch.Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        Objective(MODEL, broken)(torch.ones(3, 2), 3)


def test_a_complex_parameter_is_reported_by_its_name() -> None:
    model = nn.Linear(2, 1)
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    with pytest.raises(WrongInput, match=r"^trainer\.model: parameter phase is torch\.complex64; .*view_as_real$"):
        Layout.of(model)


def test_a_rank_that_computes_on_samples_of_others_learns_nothing_from_them() -> None:
    norm = nn.BatchNorm1d(2)
    kept = copies_of_buffers(norm)
    norm(torch.randn(4, 2)).sum().backward()
    assert norm.running_mean is not None
    assert norm.running_mean.any()
    put_back(norm, kept)
    assert not norm.running_mean.any()
    assert norm.num_batches_tracked == 0


def test_a_loss_that_no_parameter_learns_from_is_refused_unless_another_one_did() -> None:
    def made_to_require_grad(model: nn.Module, batch: Any) -> torch.Tensor:
        return mean(model, batch).detach().requires_grad_()

    objective = Objective(MODEL, made_to_require_grad)
    for _ in range(IDLE_STEPS - 1):
        objective(torch.ones(3, 2), 3)
        objective.learned_nothing()
    objective(torch.ones(3, 2), 3)
    with pytest.raises(UserError, match=r"reaches no parameter of trainer\.model, 3 times .*test_objective\.py"):
        objective.learned_nothing()

    objective = Objective(MODEL, mean)
    objective(torch.ones(3, 2), 3)
    for _ in range(2 * IDLE_STEPS):  # batches without a target
        objective(torch.ones(3, 2), 3)
        objective.learned_nothing()


def with_second(second: float) -> Loss:
    return lambda model, batch: (mean(model, batch), second)


@pytest.mark.parametrize(("second", "calls"), [(0.0, IDLE_STEPS), (0.4, 1)])
def test_a_second_value_that_looks_like_an_accuracy_is_said_to_be_taken_as_the_weight(
    second: float, calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    objective = Objective(MODEL, with_second(second))
    for _ in range(calls):
        objective(torch.ones(1, 2), 1)
    said = caplog.text
    assert said.count("the second value is taken as the weight of the mean") == 1
    assert "test_objective.py" in said
    objective(torch.ones(1, 2), 1)
    assert caplog.text == said


def test_a_loss_that_never_has_a_weight_trains_nothing_and_fails() -> None:
    objective = Objective(MODEL, with_second(0))
    for _ in range(MOST_WEIGHTLESS - 1):
        objective(torch.ones(1, 2), 1)
    with pytest.raises(UserError, match="nothing was trained: the second value is the weight of the mean"):
        objective(torch.ones(1, 2), 1)
