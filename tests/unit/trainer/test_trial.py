"""How near two computations of one tensor must be, and which module is named where they are not."""

import pytest
import torch
from torch import nn

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.parallel.trial import Print, Trial, tolerance

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [
        (torch.float64, 1e-6, 1e-5),
        (torch.float32, 1e-3, 1e-2),
        (torch.float16, 0.05, 0.15),
        (torch.bfloat16, 0.1, 0.25),
    ],
    ids=str,
)
def test_the_tolerance_follows_from_the_dtype(dtype: torch.dtype, least: float, most: float) -> None:
    assert least < tolerance(dtype) < most


def test_the_distance_of_two_tensors_is_known_from_their_prints() -> None:
    torch.manual_seed(0)
    tensor = torch.randn(40, 50)
    for far in (1e-6, 1e-2, 1.0):
        other = tensor + far * torch.randn(40, 50)
        found = Print.of(tensor).distance(Print.of(other))
        assert 0.4 < found / torch.linalg.vector_norm(other - tensor).item() < 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_rounding_changes_is_near_and_another_mask_is_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = torch.randn(64, 64, dtype=torch.float64)
    rounded = Print.of(exact.to(dtype))
    assert Print.of((exact * (1 + torch.finfo(dtype).eps * torch.randn(64, 64))).to(dtype)).is_near(
        rounded, dtype=dtype
    )
    dropped = nn.functional.dropout(exact, 0.1).to(dtype)
    assert not Print.of(dropped).is_near(rounded, dtype=dtype)
    assert not Print.of(torch.full((64, 64), torch.nan, dtype=dtype)).is_near(rounded, dtype=dtype)


def trial() -> Trial:
    batch = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    return Trial(loss=lambda model, batch: model(batch).sum(), batch=batch.clone, seed=1, device=CPU)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5), nn.Linear(4, 1))


def test_a_model_that_is_as_before_passes_and_keeps_its_buffers_and_chance() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    found = trial().run(model)
    trial().compare(found, model, field="trainer.parallelize")
    assert torch.initial_seed() == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_first_module_that_differs_is_named() -> None:
    model = net()
    found = trial().run(model)
    with torch.no_grad():
        model[3].weight.mul_(2)
    with pytest.raises(
        WrongInput, match=r"^trainer.parallelize: once the model is cut, module 3 returns something else"
    ):
        trial().compare(found, model, field="trainer.parallelize")


def test_the_module_in_which_the_cut_model_raises_is_named() -> None:
    model = net()
    found = trial().run(model)
    model[1] = nn.BatchNorm1d(3)
    with pytest.raises(WrongInput, match=r"^trainer.parallelize: the cut model cannot be called: .* in 1: "):
        trial().compare(found, model, field="trainer.parallelize")


def test_a_whole_model_that_cannot_be_called_is_not_compared() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    assert trial().run(model) is None
    trial().compare(None, model, field="trainer.parallelize")
