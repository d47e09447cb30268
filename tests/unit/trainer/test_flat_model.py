"""A model as flat vectors, and the cuts between servers."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from disttrain_trainer.errors import UserError, WrongInput
from disttrain_trainer.model.flat import FlatModel, Layout, cuts


@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]), st.integers(1, 20))
def test_cuts_cover_the_vector_aligned_and_equal_by_bytes(length: int, itemsize: int, servers: int) -> None:
    at = cuts(length=length, itemsize=itemsize, servers=servers)
    sizes = [(b - a) * itemsize for a, b in itertools.pairwise(at)]
    assert (at[0], at[-1], len(at)) == (0, length, servers + 1)
    assert all(cut * itemsize % 64 == 0 for cut in at[:-1])
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 64 + length * itemsize % 64


def test_parameters_and_gradients_are_views_of_flat_vectors() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = [parameter.detach().clone() for parameter in module.parameters()]
    flat = FlatModel(module)
    assert torch.equal(flat.parameters[0], torch.cat([p.flatten() for p in before]))
    flat.parameters[0].fill_(1)
    assert torch.equal(module(torch.ones(1, 3)), torch.full((1, 1), 9.0))
    module(torch.ones(1, 3)).sum().backward()
    (gradient,) = flat.gradients()
    assert torch.equal(gradient, torch.tensor([1.0] * 8 + [4.0, 4.0, 1.0]))
    assert gradient.data_ptr() == module[0].weight.grad.data_ptr()
    flat.zero_grad()
    assert module[1].weight.grad.abs().sum() == 0


def test_a_gradient_that_user_code_replaced_or_threw_away_is_put_back_in_its_place() -> None:
    module = nn.Linear(2, 2)
    flat = FlatModel(module)
    module.weight.grad = torch.full((2, 2), 7.0)
    module.bias.grad = None
    assert torch.equal(flat.gradients()[0], torch.tensor([7.0, 7, 7, 7, 0, 0]))
    module.zero_grad()
    module(torch.ones(1, 2)).sum().backward()
    assert torch.equal(flat.gradients()[0], torch.ones(6))


def test_tied_parameters_lie_there_once_and_frozen_ones_not_at_all() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    module[2].weight.requires_grad_(False)
    flat = FlatModel(module)
    assert [len(vector) for vector in flat.parameters] == [16 + 4]
    flat.parameters[0].fill_(2)
    assert module[0].weight is module[1].weight
    assert module[0].weight.sum() == 32


def test_each_dtype_has_a_vector() -> None:
    module = nn.ParameterList([torch.ones(3), torch.ones(2, dtype=torch.bfloat16), torch.ones(4)])
    flat = FlatModel(module)
    assert [(v.dtype, v.length) for v in flat.layout.vectors] == [("float32", 7), ("bfloat16", 2)]
    assert [(len(v), v.dtype) for v in flat.parameters] == [(7, torch.float32), (2, torch.bfloat16)]


def test_the_digest_tells_models_apart_by_names_shapes_and_dtypes_not_by_values() -> None:
    def digest(module: nn.Module) -> str:
        return Layout.of(module).digest

    assert digest(nn.Linear(2, 3)) == digest(nn.Linear(2, 3))
    others = [nn.Linear(3, 2), nn.Linear(2, 3).double(), nn.Sequential(nn.Linear(2, 3)), nn.Linear(2, 3, bias=False)]
    assert len({digest(module) for module in [nn.Linear(2, 3), *others]}) == 5


def test_a_model_that_a_parameter_server_cannot_take_is_refused_by_name() -> None:
    with pytest.raises(WrongInput, match=r"parameter 0 is torch\.complex64"):
        Layout.of(nn.ParameterList([torch.zeros(2, dtype=torch.complex64)]))
    with pytest.raises(WrongInput, match="no trainable parameter"):
        Layout.of(nn.ReLU())


def test_a_parameter_that_user_code_changes_in_place_is_named_and_what_we_write_is_not() -> None:
    module = nn.Sequential(nn.Embedding(4, 3, max_norm=0.1), nn.Linear(3, 1))
    flat = FlatModel(module)
    for vector in flat.parameters:
        vector.fill_(1)
    flat.refuse_changed()
    module(torch.tensor([0]))
    with pytest.raises(UserError, match=r"parameter 0\.weight was changed in place .* use strategy DataParallel"):
        flat.refuse_changed()
    flat.change = "by the script (the step() of an optimizer)"
    with pytest.raises(
        UserError, match=r"0\.weight was changed in place by the script \(the step\(\) of an optimizer\): under"
    ):
        flat.refuse_changed()
