"""Samples become a batch: by torch's default_collate, or by the user's own function."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from disttrain_trainer.data.loader import fetcher, pinned
from disttrain_trainer.errors import UserError, WrongInput

CPU = torch.device("cpu")
FIELD = "trainer.dataset: 'mine:dataset'"


class Listed(Dataset[Any]):
    """A data set of these samples."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Grouped(Listed):
    """A data set that loads several samples at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.samples[i] for i in indices]


def padded(samples: list[Any]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([x if isinstance(x, torch.Tensor) else x[0] for x in samples])


def numbers(*indices: int) -> Any:
    return np.array(indices, dtype=np.int64)


@pytest.mark.parametrize("kind", [Listed, Grouped])
def test_sequences_of_different_length_train_with_a_collate_of_the_users(kind: type[Listed]) -> None:
    fetch = fetcher(kind([torch.arange(2), torch.arange(3)]), device=CPU, field=FIELD, collate=padded)
    assert fetch(numbers(0, 1)).tolist() == [[0, 0], [1, 1], [0, 2]]


def test_a_collate_gets_the_samples_of_a_tensor_dataset_too() -> None:
    fetch = fetcher(TensorDataset(torch.arange(4.0)), device=CPU, field=FIELD, collate=padded_pairs)
    assert fetch(numbers(3, 1)) == [(3.0,), (1.0,)]


def padded_pairs(samples: list[Any]) -> list[Any]:
    return [tuple(part.item() for part in sample) for sample in samples]


@pytest.mark.parametrize(
    ("samples", "shown"),
    [
        pytest.param([torch.zeros(2), torch.zeros(3)], "float32[2] and float32[3]", id="tensors"),
        pytest.param([np.zeros(2), np.zeros(3)], "float64[2] and float64[3]", id="arrays"),
        pytest.param([(torch.zeros(2), 1), (torch.zeros(4), 2)], "tuple(float32[2], int)", id="tuples"),
        pytest.param([[1, 2], [1, 2, 3]], "list(int, int) and list(int, int, int)", id="lists"),
        pytest.param([{"x": torch.zeros(2)}, {"y": torch.zeros(2)}], "{x: float32[2]} and {y: float32[2]}", id="keys"),
        pytest.param([torch.zeros(2), None], "float32[2] and NoneType", id="a sample that is missing"),
    ],
)
def test_samples_that_do_not_stack_are_reported_with_their_shapes_and_the_fields_that_help(
    samples: list[Any], shown: str
) -> None:
    fetch = fetcher(Listed(samples), device=CPU, field=FIELD)
    with pytest.raises(UserError) as raised:
        fetch(numbers(0, 1))
    reported = str(raised.value)
    assert reported.startswith(f"{FIELD} gives samples that do not make a batch, such as {shown}")
    assert "set trainer.collate" in reported
    assert "\n" not in reported


def test_what_the_users_own_code_raises_passes_through() -> None:
    def broken(samples: list[Any]) -> Any:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fetcher(Listed([1, 2]), device=CPU, field=FIELD, collate=broken)(numbers(0, 1))


class Lengthless(Listed):
    """A data set whose length is no length."""

    def __init__(self, length: Any) -> None:
        super().__init__([])
        self.length = length

    def __len__(self) -> int:
        return self.length  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            {"train": Listed([1]), "test": Listed([2])},
            "returned a dict with the keys 'train', 'test'; expected one map-style",
        ),
        (Lengthless(40.0), "__len__ fails: 'float' object cannot be interpreted as an integer"),
        (Lengthless(-1), "__len__ fails: __len__\\(\\) should return >= 0"),
        (Lengthless(2**62), "returned a dataset of 4611686018427387904 samples; expected at most 1099511627776"),
    ],
)
def test_what_is_no_data_set_is_refused_by_the_name_of_the_field(dataset: Any, message: str) -> None:
    with pytest.raises(WrongInput, match=f"^{FIELD} returned a .*{message}" if "__len__" in message else message):
        fetcher(dataset, device=CPU, field=FIELD)


def test_samples_of_a_kind_that_cannot_be_collated_are_not_blamed_on_their_shapes() -> None:
    fetch = fetcher(Listed([None, None]), device=CPU, field=FIELD)
    with pytest.raises(UserError, match="of a kind that torch's default_collate cannot put into a batch, NoneType"):
        fetch(np.array([0, 1]))


class Drawing(Listed):
    """A data set whose samples draw from every generator."""

    def __getitem__(self, index: int) -> Any:
        return index, torch.rand(()).item(), np.random.random(), random.random()


def drawn(*indices: int, epoch: int, seed: int = 7) -> list[tuple[float, ...]]:
    """What samples drew, in their order."""
    batch = fetcher(Drawing([0] * 100), device=CPU, field=FIELD, seed=seed)(numbers(*indices), epoch)
    return list(zip(*(values.tolist() for values in batch), strict=True))


def test_a_sample_draws_the_same_in_any_batch_and_after_any_other() -> None:
    together = drawn(3, 1, 2, epoch=1)
    assert drawn(2, epoch=1) + drawn(3, 1, epoch=1) == [together[2], *together[:2]]


def test_no_two_samples_epochs_or_seeds_draw_the_same() -> None:
    every = [*drawn(1, 2, epoch=1), *drawn(1, 2, epoch=2), *drawn(1, 2, epoch=1, seed=8)]
    values = [value for sample in every for value in sample[1:]]
    assert len(set(values)) == len(values)


def test_a_data_set_that_loads_several_samples_at_once_draws_what_the_batch_decides() -> None:
    class Together(Drawing):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

    fetch = fetcher(Together([0] * 100), device=CPU, field=FIELD, seed=7)
    first = fetch(numbers(3, 1), 1)
    fetch(numbers(5), 1)
    assert [values.tolist() for values in fetch(numbers(3, 1), 1)] == [values.tolist() for values in first]


def test_tensors_in_memory_are_indexed_without_touching_a_generator() -> None:
    fetch = fetcher(TensorDataset(torch.arange(4.0)), device=CPU, field=FIELD)
    before = torch.get_rng_state(), random.getstate()
    fetch(numbers(1, 2), 1)
    assert not fetch.by_sample
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_every_tensor_of_a_batch_is_put_into_pinned_memory_and_nothing_else_is_touched() -> None:
    class Pinnable:
        def pin_memory(self) -> str:
            return "pinned"

    batch = {"x": [Pinnable(), 3], "y": ("text", None, Pinnable())}
    assert pinned(batch) == {"x": ["pinned", 3], "y": ("text", None, "pinned")}
