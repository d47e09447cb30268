"""Seeds: any that the API takes, another one for each part, and the same for every call of a factory."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from configs import config_of
from disttrain_trainer.data.chance import mix
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model.task import factory_seeds, seed_all, seed_process


@pytest.mark.parametrize("seed", [0, 1, 16_777_215, 16_777_216, 20_240_615, 2**31 - 1])
def test_each_part_of_a_job_has_a_seed_of_its_own_that_torch_takes(seed: int) -> None:
    seeds = [mix(seed, number) for number in [*range(1000), 2**62]]
    assert len(set(seeds)) == len(seeds)
    for number in seeds:
        torch.Generator().manual_seed(number)


def test_neighbouring_seeds_share_no_part() -> None:
    assert not {mix(3, number) for number in range(1000)} & {mix(4, number) for number in range(1000)}


def test_a_factory_finds_the_generators_of_every_library_in_the_same_state() -> None:
    draws = []
    for _ in range(2):
        seed_all(2**31 - 1)
        draws.append((torch.rand(()).item(), float(np.random.rand()), random.random()))
    assert draws[0] == draws[1]


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_each_worker_draws_other_numbers_than_the_others_and_than_the_process_before_it() -> None:
    drawn = []
    for rank, incarnation in ((0, "a"), (1, "b"), (0, "c")):
        seed_process(7, rank=rank, incarnation=incarnation)
        drawn += [*draws(), *draws()]
    assert len(set(drawn)) == len(drawn)


def test_a_factory_that_is_called_later_leaves_each_worker_its_own_numbers() -> None:
    seed_process(7, rank=0, incarnation="a")
    alone = [draws(), draws()]
    seed_process(7, rank=0, incarnation="a")
    first = draws()
    with factory_seeds(7):
        made = draws()
    assert [first, draws()] == alone
    with factory_seeds(7):
        assert draws() == made


@pytest.mark.parametrize(
    ("strategy", "alike"),
    [
        ({"type": "DataParallel"}, False),
        ({"type": "ModelParallel", "modelParallel": {"tensor": 2}}, True),
        ({"type": "ModelParallel", "modelParallel": {"pipeline": 2}}, True),
    ],
    ids=["data", "tensor", "pipeline"],
)
def test_ranks_that_compute_a_part_together_draw_the_same_and_others_do_not(
    strategy: dict[str, Any], alike: bool
) -> None:
    names = {"model": "disttrain_trainer.examples.digits:model", "dataset": "disttrain_trainer.examples.digits:dataset"}
    trainer = names | {"optimizer": {"name": "SGD", "learningRate": 0.1}, "maxSteps": 9, "batchSize": 32}
    config = config_of({"strategy": strategy, "worker": {"replicas": 2}, "trainer": trainer})
    drawn = []
    for rank in range(2):
        task = tasks.build(config, rank=rank, local_rank=0, incarnation=str(rank))
        task.seed(task.schedule.part(0))
        drawn.append(draws())
    assert drawn[0][0] == drawn[1][0]  # torch's
    assert [one == other for one, other in zip(*drawn, strict=True)][1:] == [alike, alike]


@pytest.mark.parametrize("draw", [random.random, np.random.rand, None], ids=["random", "numpy", "none"])
def test_what_a_model_draws_from_python_or_numpy_becomes_a_function_of_the_part(
    draw: Callable[[], float] | None,
) -> None:
    names = {"model": "disttrain_trainer.examples.digits:model", "dataset": "disttrain_trainer.examples.digits:dataset"}
    trainer = names | {"optimizer": {"name": "SGD", "learningRate": 0.1}, "maxSteps": 9, "batchSize": 32}
    config = config_of({"strategy": {"type": "DataParallel"}, "worker": {"replicas": 2}, "trainer": trainer})
    drawn = []
    for rank in range(2):
        task = tasks.build(config, rank=rank, local_rank=0, incarnation=str(rank))
        task.seed(task.schedule.part(rank), others=True)
        found = [draw() if draw is not None else 0.0]
        task.notice_draws(task.schedule.part(rank))
        assert task.seeds_all is (draw is not None)
        task.seed(task.schedule.part(5))  # which worker computes it does not matter
        drawn.append((*found, *draws()))
    same = [one == other for one, other in zip(*drawn, strict=True)]
    assert same == [draw is None, True, draw is not None, draw is not None]
