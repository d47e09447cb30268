"""Which batches a training process has loaded ahead: those of its parts, as it knows them."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import pytest

from configs import config_of
from disttrain_trainer.data.loader_processes import Key
from disttrain_trainer.data.loading import Loading
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.model import task as tasks
from disttrain_trainer.net.members import ParameterServerMember


class Loaders:
    """Remembers what it is asked for."""

    ahead = 4

    def __init__(self) -> None:
        self.now: list[Key] = []
        self.coming: list[Key] = []

    def foresee(self, now: Iterable[Key], coming: Iterable[Key]) -> None:
        self.now, self.coming = list(now), list(islice(coming, self.ahead))

    def take(self, key: Key) -> Any:
        return key


def schedule(parts: int = 4) -> Schedule:
    return Schedule(samples=64, batch_size=16, parts_per_step=parts, seed=0, max_steps=10)


def test_a_rank_foresees_the_same_numbers_of_each_later_step() -> None:
    loaders = Loaders()
    Loading(loaders, schedule()).foresee_steps(2, [1, 2])
    assert loaders.now == [(9, 0), (10, 0)]
    assert loaders.coming == [(13, 0), (14, 0), (17, 0), (18, 0)]


def test_nothing_is_foreseen_beyond_the_last_step() -> None:
    loaders = Loaders()
    Loading(loaders, schedule()).foresee_steps(8, [3])
    assert (loaders.now, loaders.coming) == ([(35, 0)], [(39, 0)])


def test_a_part_of_local_steps_has_a_batch_for_each() -> None:
    loaders = Loaders()
    loading = Loading(loaders, schedule(), batches=3)
    assert loading.ahead == 2
    loading.foresee((5,), (7, 8))
    assert loaders.now == [(5, 0), (5, 1), (5, 2)]
    assert loaders.coming == [(7, 0), (7, 1), (7, 2), (8, 0)]


def test_a_worker_with_loader_processes_has_enough_parts_assigned_for_each_of_them() -> None:
    member = ParameterServerMember()
    assert member.parts_to_request(0.0) == 2
    member.ahead = 4
    assert member.parts_to_request(0.0) == member.parts_to_request(0.5) == 8
    member.assignments.extend(range(5))
    assert member.parts_to_request(0.5) == 0, "half of them are left"


@pytest.mark.parametrize("example", ["digits", "mlp"])
def test_no_process_is_started_for_tensors_in_memory(example: str) -> None:
    module = f"disttrain_trainer.examples.{example}"
    trainer = {
        "model": f"{module}:model",
        "dataset": f"{module}:dataset",
        "optimizer": {"name": "SGD", "learningRate": 0.1},
        "maxSteps": 9,
        "batchSize": 32,
        "loaderWorkers": 2,
    }
    config = config_of({"strategy": {"type": "DataParallel"}, "worker": {"replicas": 1}, "trainer": trainer})
    assert tasks.build(config, rank=0, local_rank=0, incarnation="").loading is None
