"""Named values of a loss: which forms are taken, how parts and workers weigh, what is bounded, and what is said of a wrong one."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from disttrain.api.runtime import Progress
from disttrain.api.termination import Termination
from disttrain.api.values import MOST_VALUES
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.errors import UserError
from disttrain_trainer.model.objective import Objective

MODEL = nn.Linear(2, 1)


def objective_of(rest: tuple[Any, ...]) -> Objective:
    return Objective(MODEL, lambda model, batch: (model(batch).square().mean(), *rest))


@pytest.mark.parametrize(
    ("rest", "weight"),
    [(({"a": 0.5},), None), ((None, {"a": 0.5}), None), ((7, {"a": 0.5}), 7.0), ((None,), None), ((7, {}), 7.0)],
)
def test_a_loss_may_name_values_with_or_without_a_weight(rest: tuple[Any, ...], weight: float | None) -> None:
    objective = objective_of(rest)
    assert objective(torch.ones(3, 2), 3)[1] == weight
    assert objective.values == ({"a": 0.5} if rest[-1] else None)


def test_values_of_any_kind_of_number_are_taken_without_a_graph() -> None:
    given = {"tensor": MODEL.weight.sum(), "one": torch.ones(1, 1), "numpy": np.float32(2), "whole": 3, "flag": True}
    objective = objective_of((given,))
    objective(torch.ones(3, 2), 3)
    values = objective.values or {}
    assert {name: float(value) for name, value in values.items() if name != "tensor"} == {
        "one": 1, "numpy": 2, "whole": 3, "flag": 1,
    }  # fmt: skip
    assert isinstance(values["tensor"], torch.Tensor)
    assert not values["tensor"].requires_grad


def test_a_value_that_is_cut_over_ranks_is_made_whole_where_the_loss_is_computed() -> None:
    class Cut(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            return torch.tensor(0.75)

    objective = objective_of(({"accuracy": torch.zeros(()).as_subclass(Cut)},))
    objective(torch.ones(3, 2), 3)
    assert objective.values is not None
    assert float(objective.values["accuracy"]) == 0.75


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (({'a"b': 1},), "trainer.loss returned a value named 'a\"b'; expected a name of 1 to 64"),
        (({"x" * 65: 1},), "expected a name of 1 to 64"),
        (({3: 1},), "returned a value named 3;"),
        (({"acc": torch.ones(3)},), "the value 'acc' as a torch.float32 tensor of shape (3,); expected a number"),
        (({"acc": "high"},), "the value 'acc' as 'high'; expected a number"),
        (({f"v{n}": 1 for n in range(17)},), f"values of more than {MOST_VALUES} names"),
        ((1, 2, {"a": 1}), "returned 4 values; expected the batch's mean loss, (mean, weight)"),
        (({"a": 1}, 2), "returned 3 values; expected the batch's mean loss"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_field(rest: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UserError) as raised:
        objective_of(rest)(torch.ones(3, 2), 3)
    assert said in str(raised.value)
    assert __file__ in str(raised.value)


def test_names_are_counted_over_all_steps() -> None:
    numbers = iter(range(MOST_VALUES + 1))
    objective = Objective(MODEL, lambda model, batch: (model(batch).mean(), {f"value {next(numbers)}": 1}))
    for _ in range(MOST_VALUES):
        objective(torch.ones(3, 2), 3)
    with pytest.raises(UserError, match="the last is 'value 16'"):
        objective(torch.ones(3, 2), 3)


def test_values_of_workers_are_averaged_by_weight() -> None:
    tracker = Tracker(attempt=1)
    tracker.report(rank=0, samples=1, loss=1.0, now=0.0, values={"a": (3.0, 1.0), "b": (1.0, 1.0)})
    tracker.report(rank=1, samples=3, loss=1.0, now=0.0, values={"a": (3.0, 3.0), "b": (math.nan, 3.0)})
    assert tracker.progress(now=0.0, waiting_for=None).values == {"a": 1.5, "b": 1.0}


def test_a_finished_job_has_the_mean_of_its_last_steps_each_part_once() -> None:
    tracker = Tracker(attempt=1)
    tracker.report(
        rank=0, samples=1, loss=1.0, now=0.0, values={"a": (9.0, 1.0)}, final_values=[(4, {"a": (9.0, 1.0)})]
    )
    again = [(4, {"a": (1.0, 1.0)}), (5, {"a": (6.0, 3.0)})]
    tracker.report(rank=0, samples=4, loss=1.0, now=1.0, values={"a": (7.0, 4.0)}, final_values=again)
    tracker.finish(1.0)
    assert tracker.progress(now=1.0, waiting_for=None).values == {"a": 7 / 4}


def test_all_workers_together_have_a_bounded_number_of_names() -> None:
    tracker = Tracker(attempt=1)
    for rank in range(3):
        values = {f"rank {rank} value {number}": (1.0, 1.0) for number in range(MOST_VALUES)}
        tracker.report(rank=rank, samples=1, loss=1.0, now=0.0, values=values)
    assert len(tracker.progress(now=0.0, waiting_for=None).values or {}) == MOST_VALUES


def test_the_longest_values_leave_a_termination_message_readable() -> None:
    values = {f"{number:064}": -1.2345678901234567e-300 for number in range(MOST_VALUES)}
    evaluation = {f"e{number:060}": 1.2345678901234567 for number in range(24)}
    progress = Progress(attempt=1, step=7, values=values, evaluation=evaluation, waiting_for="x" * 200)
    text = Termination(message="m" * 200, progress=progress).encode()
    assert len(text.encode()) <= 4096
    found = Termination.decode(text).progress
    assert found is not None
    assert found.step == 7
