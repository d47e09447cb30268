"""Seeds: any that the API takes, another one for each slice, and the same for every call of a factory."""

import random

import numpy as np
import pytest
import torch

from disttrain_trainer.task import mix, seed_all


@pytest.mark.parametrize("seed", [0, 1, 16_777_215, 16_777_216, 20_240_615, 2**31 - 1])
def test_each_slice_of_a_job_has_a_seed_of_its_own_that_torch_takes(seed: int) -> None:
    seeds = [mix(seed, number) for number in [*range(1000), 2**62]]
    assert len(set(seeds)) == len(seeds)
    for number in seeds:
        torch.Generator().manual_seed(number)


def test_neighbouring_seeds_share_no_slice() -> None:
    assert not {mix(3, number) for number in range(1000)} & {mix(4, number) for number in range(1000)}


def test_a_factory_finds_the_generators_of_every_library_in_the_same_state() -> None:
    draws = []
    for _ in range(2):
        seed_all(2**31 - 1)
        draws.append((torch.rand(()).item(), float(np.random.rand()), random.random()))
    assert draws[0] == draws[1]
