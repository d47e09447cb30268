"""The squared norm of a vector has the same bits however the vector is cut."""

import math
import random
from itertools import pairwise

import pytest
import torch

from disttrain_trainer.model.square_tree import merged, total
from disttrain_trainer.parameter_server.squares import nodes_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 1000, 4099])
def test_no_cut_changes_a_bit(length: int, dtype: torch.dtype) -> None:
    chance = random.Random(length)
    values = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
    found = set()
    for _ in range(20):
        cuts = [0, *sorted(chance.randint(0, length) for _ in range(chance.randint(0, 5))), length]
        parts = []
        for start, stop in pairwise(cuts):
            blocks = values[start:stop].split(chance.choice((1, 7, 64, 5000)))
            parts.append(nodes_of(blocks, start))
            assert len(parts[-1]) <= 2 * length.bit_length()
        chance.shuffle(parts)
        found.add(total(node for nodes in parts for node in nodes))
    (square,) = found
    assert square == pytest.approx(math.fsum(float(value) ** 2 for value in values), rel=1e-14)


def test_padding_with_zeros_changes_no_bit() -> None:
    values = torch.randn(77, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([values, torch.zeros(51)])
    assert total(nodes_of([values], 0)) == total(nodes_of([padded], 0))


def test_nothing_has_the_square_0_and_what_is_not_finite_stays_so() -> None:
    assert total([]) == 0.0
    assert nodes_of([torch.zeros(0)], 5) == []
    assert total(nodes_of([torch.tensor([1.0, math.inf, 2.0])], 3)) == math.inf
    assert math.isnan(total(nodes_of([torch.tensor([1.0, math.nan])], 0)))


def test_neighbours_become_their_parent() -> None:
    assert merged([(0, 2, 1.0), (0, 3, 2.0), (1, 2, 4.0)]) == [(1, 1, 3.0), (1, 2, 4.0)]
    assert merged([(0, 0, 1.0), (0, 1, 2.0), (1, 1, 4.0)]) == [(2, 0, 7.0)]
