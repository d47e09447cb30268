"""A worker's own steps: what it keeps from part to part ends with the round."""

import pytest
import torch
from torch import nn

from disttrain.api.optimizer import Optimizer as Settings
from disttrain.api.optimizer import OptimizerName
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.strategies.local_steps import LocalSteps

SCHEDULE = Schedule(samples=8, batch_size=8, parts_per_step=1, seed=0, max_steps=4)


def change(local: LocalSteps, model: FlatModel, module: nn.Module, step: int) -> torch.Tensor:
    """What the part of a step changes, from parameters of 1 on."""
    with torch.no_grad():
        model.parameters[0].fill_(1)
    for batch in local.begin(SCHEDULE.part(step)):
        local.weigh(batch, None)
        sum(parameter.pow(3).sum() for parameter in module.parameters()).backward()  # type: ignore[union-attr]
        local.step()
    return local.change()[0][0].clone()


@pytest.mark.parametrize(
    "optimizer",
    [{"name": "SGD", "learningRate": 0.1, "momentum": 0.9}, {"name": "AdamW", "learningRate": 0.1}],
    ids=["momentum", "AdamW"],
)
def test_moments_begin_again_when_the_servers_go_back_to_a_checkpoint(optimizer: dict[str, object]) -> None:
    module = nn.ParameterList([torch.ones(5), torch.ones(3)])
    model = FlatModel(module)
    local = LocalSteps(model, Settings.model_validate(optimizer), steps=2, full=8)
    first = change(local, model, module, 0)
    assert not torch.equal(change(local, model, module, 1), first), "they go on from part to part"
    local.reset()
    assert torch.equal(change(local, model, module, 0), first)


@pytest.mark.parametrize("clip", [None, 2.0, 100.0])
def test_each_step_is_clipped_by_the_norm_of_its_own_gradient(clip: float | None) -> None:
    module = nn.ParameterList([torch.ones(5), torch.ones(3)])
    model, alone = FlatModel(module), [torch.ones(8, requires_grad=True)]
    local = LocalSteps(model, Settings(name=OptimizerName.SGD, learning_rate=0.01), steps=2, full=8, clip=clip)
    found = change(local, model, module, 0)
    optimizer = torch.optim.SGD(alone, lr=0.01)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        alone[0].pow(3).sum().backward()
        norms.append(float(nn.utils.clip_grad_norm_(alone, clip or float("inf"))))
        optimizer.step()
    torch.testing.assert_close(found, 1 - alone[0].detach())
    assert local.norm == pytest.approx(norms[0] if clip is None else norms[1]), (
        "before the clip, of the newest step whose norm is known"
    )


def test_a_gradient_that_is_not_finite_is_of_the_part_that_began_with_finite_parameters() -> None:
    module = nn.ParameterList([torch.ones(5)])
    model = FlatModel(module)
    local = LocalSteps(model, Settings(name=OptimizerName.SGD, learning_rate=0.1), steps=2, full=8)
    first, *_ = local.begin(SCHEDULE.part(0))
    local.weigh(first, None)
    (module[0].sum() * float("nan")).backward()
    local.step()
    assert (model.is_finite(), local.began_finite) == (False, True)
    local.begin(SCHEDULE.part(1))
    assert not local.began_finite
