"""An iterable data set: each rank's stream is read once, pass after pass, and goes on where it was."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from configs import config_of
from disttrain_trainer.checkpoint.stream_positions import StreamPositions
from disttrain_trainer.data import stream as streams
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.data.stream import Position, Stream, is_stream
from disttrain_trainer.errors import UserError, WrongInput
from training.job import served


class Counted(IterableDataset[int]):
    """0, 1, 2 … and what each of them drew."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.next = 0

    def __iter__(self) -> Iterator[Any]:
        while self.next < self.length:
            self.next += 1
            yield self.next - 1, random.random(), np.random.random(), torch.rand(()).item()
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


SCHEDULE = Schedule(samples=streams.SAMPLES, batch_size=4, parts_per_step=2, seed=0, max_steps=100)


def stream_of(length: int, rank: int = 0) -> Stream:
    return Stream(Counted(length), collate=lambda samples: samples, seed=3, rank=rank, ranks=2)


def read(stream: Stream, steps: range) -> list[Any]:
    return [sample for step in steps for sample in stream.take(SCHEDULE.part(2 * step))]


def ids(samples: list[Any]) -> list[int]:
    return [sample[0] for sample in samples]


def test_a_part_is_the_next_samples_and_the_stream_begins_again_when_it_ends() -> None:
    assert ids(read(stream_of(5), range(6))) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_step_that_breaks_has_the_same_samples_when_it_is_computed_again() -> None:
    stream = stream_of(9)
    first = read(stream, range(2))
    assert read(stream, range(1, 2)) == first[2:]
    assert ids(read(stream, range(2, 3))) == [4, 5]


def test_what_samples_draw_differs_by_pass_and_rank_and_not_by_what_was_read_before() -> None:
    every = read(stream_of(4), range(4)) + read(stream_of(4, rank=1), range(4))
    drawn = [value for sample in every for value in sample[1:]]
    assert len(set(drawn)) == len(drawn)
    assert read(stream_of(4), range(4)) == every[:8]


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_stream_goes_on_from_a_position_and_passes_over_what_was_taken_since(steps: int) -> None:
    whole = read(stream_of(7), range(10))
    stream = stream_of(7)
    read(stream, range(steps))
    position = stream.position()
    for skipped in (0, 2):
        again = stream_of(7)
        again.begin(position, skip=2 * skipped, step=steps + skipped)
        assert again.next_step == steps + skipped
        assert read(again, range(steps + skipped, 10)) == whole[2 * (steps + skipped) :]


def test_an_empty_stream_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^trainer\.dataset gave no sample to rank 1 of 2"):
        read(stream_of(0, rank=1), range(1))


def test_positions_of_a_rank_are_found_by_their_step_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    positions = StreamPositions(tmp_path, rank=1, ranks=2, keep=1)
    assert positions.newest(9) is None
    for step in (2, 4, 6, 8):
        positions.write(step, Position(1, step, {"at": step, "rows": torch.arange(2)}))
    assert StreamPositions(tmp_path, rank=1, ranks=3, keep=1).newest(9) is None
    found = positions.newest(7)
    assert found is not None
    assert (found[0], found[1].passes, found[1].taken, found[1].state["at"]) == (6, 1, 6, 6)
    assert positions.newest(2) is None, "the oldest ones are deleted"
    (tmp_path / "streams" / "rank-1-of-2-step-00000008.safetensors").write_bytes(b"broken")
    assert (positions.newest(9) or (0,))[0] == 6


def test_a_state_that_cannot_be_saved_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        WrongInput, match=r"^trainer\.dataset: what its state_dict\(\) returns cannot be saved: .*'next'"
    ):
        StreamPositions(tmp_path, rank=0, ranks=1, keep=1).write(1, Position(0, 0, {"next": object()}))


@pytest.mark.parametrize(
    ("dataset", "found"),
    [
        (Counted(3), True),
        (TensorDataset(torch.ones(3)), False),
        ([1, 2], False),
        ({1, 2}, False),
        (iter([1]), False),
        (DataLoader(Counted(3)), False),
    ],
)
def test_what_is_taken_for_a_stream(dataset: Any, found: bool) -> None:
    assert is_stream(dataset) is found


TRAINER = {"model": "m:m", "dataset": "m:d", "optimizer": {"name": "SGD", "learningRate": 0.1}, "maxSteps": 9}
SERVED = served("Sync")
CUT = {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}


@pytest.mark.parametrize(
    ("spec", "trainer", "said"),
    [
        (
            SERVED,
            {},
            r"^the field returned a Counted, which is iterable; expected a map-style dataset, .* only strategy\.type",
        ),
        (CUT, {}, r"only strategy\.type DataParallel with sharding Replicated"),
        ({}, {"maxSteps": None, "epochs": 2}, r"^trainer\.epochs: the field .* set trainer\.maxSteps instead"),
        ({}, {"lastBatch": "Drop"}, r"^trainer\.lastBatch: the field .* leave lastBatch out"),
        ({}, {"nanPolicy": {"rollBacks": 1}}, r"^trainer\.nanPolicy\.rollBacks: the field .* set rollBacks to 0"),
        ({}, {"loaderWorkers": 1}, r"^trainer\.loaderWorkers: the field .* set loaderWorkers to 0"),
    ],
)
def test_a_job_that_cannot_take_a_stream_is_refused_by_its_field(
    spec: dict[str, Any], trainer: dict[str, Any], said: str
) -> None:
    chosen = {name: value for name, value in (TRAINER | trainer).items() if value is not None}
    config = config_of({"strategy": {"type": "DataParallel"}, "worker": {"replicas": 2}, **spec, "trainer": chosen})
    with pytest.raises(WrongInput, match=said):
        streams.of(config, Counted(3), field="the field", collate=None, rank=0)
