"""How a model is cut into the stages of a pipeline, and what cannot be."""

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn

from disttrain.api.strategy import ModelParallel, Schedule
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.examples import charlm
from disttrain_trainer.parallel import micro_batches
from disttrain_trainer.parallel import stages as pipeline


@given(some.lists(some.integers(0, 9), min_size=1, max_size=8), some.integers(1, 4))
def test_no_other_cut_has_a_smaller_largest_stage(costs: list[int], stages: int) -> None:
    if sum(cost > 0 for cost in costs) < stages:
        return
    cuts = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), stages - 1)]
    sums = [[sum(costs[a:b]) for a, b in pairwise(ends)] for ends in cuts]
    found = pipeline.cut(costs, stages)
    assert [number for group in found for number in group] == list(range(len(costs)))
    largest = [sum(costs[number] for number in group) for group in found]
    assert min(largest) > 0
    assert max(largest) == min(max(one) for one in sums if min(one) > 0)


@given(some.integers(1, 40), some.integers(1, 12))
def test_micro_batches_are_equal_but_for_the_last_and_no_sample_is_alone(samples: int, size: int) -> None:
    pieces = micro_batches.slices(samples, size)
    assert [number for piece in pieces for number in range(samples)[piece]] == list(range(samples))
    lengths = [piece.stop - piece.start for piece in pieces]
    assert set(lengths[:-1]) <= {size}
    assert lengths[-1] <= size + 1
    assert lengths[-1] > 1 or size == 1 or samples == 1


def test_a_sequential_is_cut_by_parameters_also_where_one_is_in_another() -> None:
    small, large = nn.Linear(2, 2), nn.Linear(40, 40)
    model = nn.Sequential(nn.Sequential(small, nn.ReLU()), nn.Linear(2, 40), large)
    first, second = pipeline.split(model, 2, config={}, by_user=None)
    assert list(first.modules())[1:] == [small, model[0][1], model[1]]
    assert list(second.modules())[1:] == [large]


def test_the_example_runs_its_stages_in_the_order_of_forward() -> None:
    model = charlm.model({"layers": 3, "width": 16, "context": 8}).eval()
    text = torch.arange(16).view(2, 8)
    stages = pipeline.split(model, 3, config={}, by_user=None)
    hidden = text
    for stage in stages:
        hidden = stage(hidden)
    assert torch.equal(hidden, model(text))


def test_what_other_stages_have_is_dropped_and_what_stays_keeps_its_name() -> None:
    model = charlm.model({"layers": 2, "width": 16})
    names = dict(model.named_parameters())
    stages = pipeline.split(model, 2, config={}, by_user=None)
    own = [name for name, parameter in names.items() if any(parameter is one for one in stages[1].parameters())]
    pipeline.keep(model, [stages[1]])
    assert [name for name, _ in model.named_parameters()] == own
    assert "layers.1.mlp.0.weight" in own
    assert "embedding.characters.weight" not in own


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)


def tied() -> nn.Module:
    return charlm.model({"tied": True})


def chosen(*stages: Callable[[Any], nn.Module]) -> pipeline.Split:
    return lambda model, count, config: [stage(model) for stage in stages]


REFUSED: list[tuple[Callable[[], nn.Module], pipeline.Split | None, str]] = [
    (Plain, None, "a Plain cannot be cut into the stages of a pipeline"),
    (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()), None, "has 1 members with parameters, and 2 stages are needed"),
    (tied, None, "embedding.characters.weight is in stage 0 and in stage 1"),
    (Plain, chosen(lambda m: m.a, lambda m: nn.ReLU()), "stage 1 of 2 has no parameters"),
    (Plain, chosen(lambda m: m.a, lambda m: nn.Linear(2, 2)), "parameter weight of stage 1 is not one of the model's"),
    (Plain, chosen(lambda m: m.a), "returned 1 stages; expected 2"),
    (Plain, lambda model, count, config: model, "returned a Plain; expected a list of 2"),
    (Plain, chosen(lambda m: m.a.weight, lambda m: m.b), "returned a list; expected a list of 2 torch.nn.Module"),
    (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)),
        chosen(lambda m: m[0], lambda m: m[1]),
        "2.weight is in no stage",
    ),
]


@pytest.mark.parametrize(("model", "by_user", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_what_cannot_be_a_pipeline_is_refused_in_one_line(
    model: Callable[[], nn.Module], by_user: pipeline.Split | None, says: str
) -> None:
    with pytest.raises(WrongInput) as error:
        pipeline.split(model(), 2, config={}, by_user=by_user)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("order", "microbatches", "fits"),
    [
        (Schedule.GPIPE, 1, True),
        (Schedule.ONE_FORWARD_ONE_BACKWARD, 3, False),
        (Schedule.ONE_FORWARD_ONE_BACKWARD, 4, True),
        (Schedule.INTERLEAVED, 9, False),
        (Schedule.INTERLEAVED, 3, True),
        (Schedule.ZERO_BUBBLE, 10, True),
    ],
)
def test_which_micro_batches_a_schedule_takes_on_four_processes(order: Schedule, microbatches: int, fits: bool) -> None:
    assert ModelParallel(pipeline=4, microbatches=8, schedule=order).takes(microbatches) == fits
