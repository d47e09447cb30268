"""Seeds: any that the API takes, another one for each part, and the same for every call of a factory."""

import random

import numpy as np
import pytest
import torch

from disttrain_trainer.model.task import factory_seeds, mix, seed_all, seed_process


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
