"""A worker's own steps: what it keeps from part to part ends with the round."""

import pytest
import torch
from torch import nn

from disttrain.api.trainer import Optimizer as Settings
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
