"""The clip of a gradient has torch's numbers."""

import math

import pytest
import torch
from torch import nn

from disttrain_trainer.model import clipping
from disttrain_trainer.model.flat import norm


def parameters(*, scale: float, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (7, 1, 40_000)]
    for parameter in made:
        parameter.grad = scale * torch.randn(parameter.shape, dtype=dtype)
    return made


@pytest.mark.parametrize("scale", [0.0, 1e-9, 0.004, 1.0, 1e6, math.inf, math.nan])
def test_the_clip_is_torchs(scale: float) -> None:
    theirs, ours = parameters(scale=scale), parameters(scale=scale)
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    before = clipping.clip([parameter.grad for parameter in ours if parameter.grad is not None], 1.0)
    assert before == pytest.approx(float(expected), rel=1e-14, nan_ok=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-14, atol=0, equal_nan=True)


def test_a_norm_is_the_same_for_any_number_of_threads() -> None:
    values = torch.randn(300_001)
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(norm([values]))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    assert found.pop() == pytest.approx(float(values.double().norm()), rel=1e-6)


def test_a_norm_of_16_bits_has_more_than_16() -> None:
    values = torch.ones(3, dtype=torch.bfloat16)
    assert norm([values, torch.zeros(0)]) == pytest.approx(math.sqrt(3), rel=1e-7)
    assert norm([]) == 0.0
