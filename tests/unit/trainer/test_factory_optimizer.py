"""trainer.optimizer.factory: an optimizer of the user's trains as in a plain loop, and its state is kept by the names of parameters."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.factory_optimizer import FactoryOptimizer
from disttrain_trainer.model.flat import FlatModel

STEPS, MIDDLE = 8, 4


class Adapting(torch.optim.SGD):
    """Keeps a number in its param group, and a list of tensors or a number in the state of each parameter."""

    keeps_list = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["distance"] = group.get("distance", 0.0) + 0.5
            group["bounds"] = (group["distance"], 1)
            for parameter in group["params"]:
                self.state[parameter]["seen"] = [torch.zeros(1)] if self.keeps_list else 3


class Listing(Adapting):
    keeps_list = True


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def gradients_in(step: int, parameters: list[nn.Parameter]) -> Iterator[torch.Tensor | None]:
    """The last one takes part in every other step."""
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        yield gradient if number < len(parameters) - 1 or step % 2 else None


def train(ours: FactoryOptimizer, flat: FlatModel, steps: range) -> None:
    for step in steps:
        flat.zero_grad()
        found = list(gradients_in(step, flat.trained))
        for parameter, gradient in zip(flat.trained, found, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient
        ours.step(flat.gradients(), flat.took_part, rate=1 / (1 + step))


def by_torch(make: Any) -> torch.Tensor:
    plain = model()
    parameters = list(plain.parameters())
    optimizer = make(parameters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients_in(step, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        scheduler.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


MAKERS = {
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5),
    "two groups": lambda parameters: torch.optim.NAdam(
        [{"params": parameters[::2], "lr": 0.1}, {"params": parameters[1::2], "betas": (0.7, 0.8)}], lr=0.01
    ),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "adapting": lambda parameters: Adapting(parameters, lr=0.01, momentum=0.9),
    "rate in a tensor": lambda parameters: torch.optim.SGD(parameters, lr=torch.tensor(0.01, dtype=torch.float64)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_it_trains_as_in_a_plain_loop_with_a_scheduler_also_through_a_checkpoint(make: Any) -> None:
    whole = FlatModel(model())
    train(FactoryOptimizer(make, whole.named), whole, range(STEPS))
    first = FlatModel(model())
    before = FactoryOptimizer(make, first.named)
    train(before, first, range(MIDDLE))
    saved = {name: tensor.clone() for name, tensor in before.named_state().items()}
    second = FlatModel(model())
    second.parameters[0].copy_(first.parameters[0])
    after = FactoryOptimizer(make, second.named)
    after.take(saved, source="a checkpoint")
    train(after, second, range(MIDDLE, STEPS))
    assert torch.equal(whole.parameters[0], by_torch(make))
    assert torch.equal(second.parameters[0], whole.parameters[0])


def test_numbers_that_the_optimizer_changes_are_taken_over_and_those_of_the_factory_are_not() -> None:
    flat = FlatModel(model())
    before = FactoryOptimizer(lambda parameters: Adapting(parameters, lr=0.01, weight_decay=0.1), flat.named)
    train(before, flat, range(2))
    made: list[torch.optim.Optimizer] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(Adapting(parameters, lr=0.5, weight_decay=0.2))
        return made[0]

    FactoryOptimizer(make, FlatModel(model()).named).take(before.named_state(), source="a checkpoint")
    (group,) = made[0].param_groups
    assert (group["distance"], list(group["bounds"]), group["weight_decay"], group["lr"]) == (1.0, [1.0, 1], 0.2, 0.5)


def test_before_the_first_step_there_is_no_state_and_a_state_of_none_is_taken_over() -> None:
    flat = FlatModel(model())
    ours = FactoryOptimizer(MAKERS["RMSprop"], flat.named)
    assert ours.named_state() == {}
    train(ours, flat, range(1))
    ours.take({}, source="worker-0")
    assert ours.named_state() == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda parameters: parameters, r"trainer\.optimizer\.factory returned a list; expected a torch\.optim\.Opt"),
        (
            lambda parameters: torch.optim.SGD([nn.Parameter(torch.zeros(7))], lr=0.1),
            r"trainer\.optimizer\.factory: the optimizer has a tensor of shape \[7\] that is no trained parameter",
        ),
        (torch.optim.LBFGS, r"trainer\.optimizer\.factory: the step of LBFGS calls the loss itself, by a closure"),
    ],
)
def test_what_is_no_optimizer_of_the_model_is_refused(make: Any, message: str) -> None:
    with pytest.raises(WrongInput, match=message):
        FactoryOptimizer(make, FlatModel(model()).named)


def test_a_schedule_that_could_multiply_nothing_is_refused() -> None:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        del optimizer.param_groups[0]["lr"]
        return optimizer

    FactoryOptimizer(make, FlatModel(model()).named)
    with pytest.raises(
        WrongInput, match=r"trainer\.learningRateSchedule: the SGD of trainer\.optimizer\.factory has no"
    ):
        FactoryOptimizer(make, FlatModel(model()).named, scheduled=True)


def test_state_that_a_checkpoint_cannot_hold_is_named() -> None:
    flat = FlatModel(model())
    ours = FactoryOptimizer(lambda parameters: Listing(parameters, lr=0.1), flat.named)
    train(ours, flat, range(1))
    with pytest.raises(WrongInput, match=r"the state 'seen' of parameter 0\.weight is a list, which a checkpoint"):
        ours.named_state()


def test_state_of_other_parameters_is_refused() -> None:
    flat = FlatModel(model())
    ours = FactoryOptimizer(MAKERS["two groups"], flat.named)
    train(ours, flat, range(1))
    some = dict(list(FlatModel(model()).named.items())[:2])
    other = FactoryOptimizer(MAKERS["RMSprop"], some)
    with pytest.raises(WrongInput, match=r"step-1 is of another optimizer: it has state of 2\.weight"):
        other.take(ours.named_state(), source="step-1")
