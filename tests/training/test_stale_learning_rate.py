"""staleLearningRate Inverse: a gradient is applied with the learning rate / its staleness, as written down here once more."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.parameter_server import FlatModel
from training.parameter_servers import ASYNC, bounded, enter, make_client, make_config, serving

LENGTH, WORKERS = 70, 3
ORDER = "p0 p1 p2 g0 g1 g2 p0 g0 p1 p2 g2 p2 g2 p0 g0 p0 g0 g1 p1 g1 p2 g2 p0 p1 g1 g0"
PULLS_AND_PUSHES = tuple(ORDER.split())
"""In this order: worker k pulls (pk), worker k pushes the gradient at what it pulled last (gk). Staleness 0 to 4 occurs."""
START = torch.linspace(-1, 1, LENGTH, dtype=torch.float64)


def gradient_at(parameters: torch.Tensor, number: int) -> torch.Tensor:
    """Another function for each part, so that an order that is wrong shows."""
    return torch.sin(parameters * (number + 1)) + 0.1 * number


def written_down(stepper_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer], rate: float) -> torch.Tensor:
    """The definition: one process, one step at a time."""
    parameters = nn.Parameter(START.clone())
    stepper = stepper_of([parameters])
    version, pulled, seen = 0, {}, set()
    for event in PULLS_AND_PUSHES:
        worker = int(event[1])
        if event[0] == "p":
            pulled[worker] = (version, parameters.detach().clone())
            continue
        of, values = pulled[worker]
        staleness = version - of
        seen.add(staleness)
        stepper.param_groups[0]["lr"] = rate / staleness if staleness >= 1 else rate
        parameters.grad = gradient_at(values, version)
        stepper.step()
        version += 1
    assert {0, 1, 2, 4} <= seen
    return parameters.detach()


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("consistency", [ASYNC, bounded(4)], ids=["Async", "BoundedStaleness"])
@pytest.mark.parametrize(
    ("optimizer", "stepper_of"),
    [
        ({"name": "SGD", "learningRate": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
        (
            {"name": "SGD", "learningRate": 0.1, "momentum": 0.9, "weightDecay": 0.01},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        ),
        (
            {"name": "AdamW", "learningRate": 0.1, "weightDecay": 0.1},
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        ),
    ],
    ids=["SGD", "momentum", "AdamW"],
)
def test_each_gradient_is_applied_with_the_learning_rate_by_its_staleness(
    optimizer: dict[str, object],
    stepper_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    consistency: dict[str, object],
    servers: int,
) -> None:
    policy = {**consistency, "staleLearningRate": "Inverse"}
    config = make_config(workers=WORKERS, servers=servers, consistency=policy, optimizer=optimizer)
    schedule = Schedule(samples=400, batch_size=3, parts_per_step=WORKERS, seed=0, max_steps=20)
    with serving(config) as shards:
        models = [FlatModel(nn.ParameterList([nn.Parameter(START.clone())])) for _ in range(WORKERS)]
        clients = [enter(make_client(shards, config, rank=rank), model, join=True) for rank, model in enumerate(models)]
        part = 0
        for event in PULLS_AND_PUSHES:
            worker = int(event[1])
            (values,) = models[worker].parameters
            if event[0] == "p":
                clients[worker].pull(models[worker].parameters)
            else:
                clients[worker].push(schedule.part(part), (gradient_at(values, part),))
                part += 1
        clients[0].pull(models[0].parameters)
        assert clients[0].versions == (part,) * servers
        torch.testing.assert_close(models[0].parameters[0], written_down(stepper_of, 0.1), atol=1e-12, rtol=0)
