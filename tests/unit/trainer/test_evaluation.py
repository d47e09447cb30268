"""What an evaluation may return, and what is said of one that cannot travel to the master."""

import logging
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from disttrain.api.termination import Termination
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model import evaluation
from disttrain_trainer.model.evaluation import LONGEST_NAME, Evaluator, numbers_of
from disttrain_trainer.net import incoming
from disttrain_trainer.net.messages import MessageType, decode, encode


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"accuracy": torch.tensor([[0.5]]), 3: True}, {"accuracy": 0.5, "3": 1.0}),
        ({"x" * 5000: 1}, {"x" * LONGEST_NAME: 1.0}),
        ({"caf\udce9": 1}, {"caf?": 1.0}),
        ({"perplexity": float("inf")}, {"perplexity": float("inf")}),
        ({f"class {number}": 0.5 for number in range(5000)}, {f"class {number}": 0.5 for number in range(5000)}),
    ],
)
def test_the_master_understands_what_an_evaluation_returned(found: Any, expected: dict[str, float]) -> None:
    numbers = numbers_of(found, "mine:evaluate")
    assert numbers == expected
    message = decode(encode(MessageType.EVALUATED, stay="m.1", evaluation=numbers))
    assert incoming.parse(message)["evaluation"] == expected


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "returned None; expected a dict of names and numbers"),
        ({"per class": torch.ones(3)}, "expected a dict of names and numbers"),
        ({"big": 10**400}, "expected a dict of names and numbers"),
        (
            {f"sample {number}": 0.123456789 for number in range(60_000)},
            "returned 60000 numbers, .* KiB as JSON; expected",
        ),
    ],
)
def test_an_evaluation_that_cannot_travel_is_wrong_input(found: Any, said: str) -> None:
    with pytest.raises(WrongInput, match=rf"^trainer\.evaluate: 'mine:evaluate' .*{said}"):
        numbers_of(found, "mine:evaluate")


def test_the_message_of_an_error_that_utf8_cannot_hold_is_written_all_the_same() -> None:
    said = Termination.decode(Termination(message="cannot open caf\udce9.png", where="/home/\udce9/mine.py:3").encode())
    assert (said.message, said.where) == ("cannot open caf?.png", "/home/?/mine.py:3")


def need_accuracy(numbers: dict[str, float]) -> None:
    if "accuracy" not in numbers:
        raise WrongInput("trainer.evaluate returned no 'accuracy'")


def tried(function: Any) -> list[int]:
    """How many samples each call before the first step had."""
    calls: list[int] = []

    def evaluate(model: nn.Module, data: Any) -> Any:
        calls.append(len(data))
        with torch.no_grad():
            model.weight.zero_()  # type: ignore[operator, union-attr]
        return function(data)

    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    evaluator = Evaluator(
        evaluate, name="mine:evaluate", dataset=lambda: TensorDataset(torch.ones(9, 2)), seeds=nullcontext
    )
    try:
        evaluator.attempt(model, need_accuracy)
    finally:
        assert torch.equal(model.weight, before)
    return calls


def test_before_the_first_step_two_samples_show_that_an_evaluation_is_right() -> None:
    assert tried(lambda data: {"accuracy": float(data.tensors[0].mean())}) == [2]


def test_what_two_samples_lack_is_looked_for_in_all() -> None:
    assert tried(lambda data: {"accuracy" if len(data) > 2 else "loss": 1.0}) == [2, 9]


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        (lambda data: {"acuracy": 1.0}, WrongInput, "no 'accuracy'"),
        (lambda data: None, WrongInput, "'mine:evaluate' returned None; expected a dict"),
        (lambda data: {"accuracy": acuracy}, NameError, "acuracy"),  # type: ignore[name-defined]  # noqa: F821
    ],
    ids=["another metric", "no numbers", "a name that is not there"],
)
def test_a_mistake_that_no_training_changes_is_raised_before_the_first_step(
    function: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        tried(function)


def test_what_may_come_of_the_two_samples_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def evaluate(data: Any) -> Any:
        raise ValueError("only one class")

    with caplog.at_level(logging.WARNING, "disttrain_trainer"):
        assert tried(evaluate) == [2]
    assert "trainer.evaluate fails with 2 samples before the first step (ValueError: only one class" in caplog.text


def test_an_evaluation_that_takes_long_is_left_to_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_FEW_SECONDS", 0.05)
    assert tried(lambda data: time.sleep(30)) == [2]
