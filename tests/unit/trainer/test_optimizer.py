"""The optimisers of a shard, block by block, and of a rank, on flat vectors, are those of torch."""

import pytest
import torch

from disttrain.api.optimizer import Optimizer as Settings
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.parameter_server.optimizer import PADDING, Optimizer

CASES = [
    pytest.param({"name": "SGD", "learningRate": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1), id="SGD"),
    pytest.param(
        {"name": "SGD", "learningRate": 0.1, "weightDecay": 0.3},
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3),
        id="SGD with an L2 penalty",
    ),
    pytest.param(
        {"name": "SGD", "learningRate": 0.1, "momentum": 0.9, "weightDecay": 0.3},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.3),
        id="momentum",
    ),
    pytest.param(
        {"name": "SGD", "learningRate": 0.1, "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        id="Nesterov",
    ),
    pytest.param(
        {"name": "Adam", "learningRate": 0.1, "weightDecay": 0.3, "epsilon": 1e-4},
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.3, eps=1e-4),
        id="Adam",
    ),
    pytest.param(
        {"name": "AdamW", "learningRate": 0.1, "beta1": 0.7, "beta2": 0.8},
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.7, 0.8), weight_decay=0),
        id="AdamW",
    ),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize(("settings", "reference"), CASES)
def test_blocks_take_the_steps_of_torch(
    settings: dict[str, object], reference, scale: float, in_place: bool, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(4 * PADDING, generator=generator, dtype=dtype)
    theirs = torch.nn.Parameter(parameters.clone())
    stepper = reference([theirs])
    ours = Optimizer(Settings.model_validate(settings))
    ours.bind([parameters], block=PADDING)
    for _ in range(20):
        gradient = torch.randn(len(parameters), generator=generator, dtype=dtype)
        theirs.grad = scale * gradient
        stepper.step()
        for start in range(0, len(parameters), PADDING):
            block = slice(start, start + PADDING)
            current = parameters[block]
            ours.step(0, block, current, gradient[block], scale=scale, out=current if in_place else gradient[block])
        ours.advance()
        if not in_place:
            parameters = gradient
    torch.testing.assert_close(parameters, theirs.detach(), atol=tolerance, rtol=tolerance)


def test_a_step_that_writes_elsewhere_leaves_the_parameters_as_they_were() -> None:
    for case in CASES:
        ours = Optimizer(Settings.model_validate(case.values[0]))
        parameters, gradient = torch.ones(PADDING), torch.ones(PADDING)
        ours.bind([parameters], block=PADDING)
        ours.step(0, slice(0, PADDING), parameters, gradient, scale=0.5, out=gradient)
        assert torch.equal(parameters, torch.ones(PADDING))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize(("settings", "reference"), CASES)
def test_a_rank_takes_the_steps_of_torch(
    settings: dict[str, object], reference, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(100, generator=generator, dtype=dtype)
    theirs = torch.nn.Parameter(parameters.clone())
    stepper = reference([theirs])
    flat = FlatModel(torch.nn.ParameterList([parameters]))
    (parameters,) = flat.parameters
    ours = FlatOptimizer(Settings.model_validate(settings), flat)
    for _ in range(20):
        gradient = torch.randn(len(parameters), generator=generator, dtype=dtype)
        theirs.grad = gradient.clone()
        stepper.step()
        ours.step([gradient])
    torch.testing.assert_close(parameters, theirs.detach(), atol=tolerance, rtol=tolerance)
