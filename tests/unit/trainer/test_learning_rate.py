"""trainer.learningRateSchedule: the factor of each step is that of torch's own schedulers, and every shard's gradients have it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR, StepLR

from disttrain.api.optimizer import Optimizer as Settings
from disttrain.api.schedule import LearningRateSchedule
from disttrain.api.strategy import StaleLearningRate
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.learning_rate import LearningRate
from disttrain_trainer.parameter_server.step_rate import StepRate
from disttrain_trainer.strategies.local_steps import LocalSteps

STEPS, RATE = 50, 0.3
DECAYS: dict[str, tuple[dict[str, Any], Callable[[torch.optim.Optimizer, int], LRScheduler]]] = {
    "constant": ({"type": "Constant"}, lambda o, n: ConstantLR(o, factor=1)),
    "linear": ({"type": "Linear"}, lambda o, n: LinearLR(o, start_factor=1, end_factor=0, total_iters=n)),
    "linear to a tenth": (
        {"type": "Linear", "minimumFactor": 0.1},
        lambda o, n: LinearLR(o, start_factor=1, end_factor=0.1, total_iters=n),
    ),
    "cosine": ({"type": "Cosine"}, lambda o, n: CosineAnnealingLR(o, T_max=n)),
    "cosine to a tenth": (
        {"type": "Cosine", "minimumFactor": 0.1},
        lambda o, n: CosineAnnealingLR(o, T_max=n, eta_min=0.1 * RATE),
    ),
    "step": ({"type": "Step", "stepSize": 7}, lambda o, n: StepLR(o, step_size=7)),
    "step by a half": ({"type": "Step", "stepSize": 1, "gamma": 0.5}, lambda o, n: StepLR(o, step_size=1, gamma=0.5)),
}


def schedule_of(**settings: Any) -> LearningRateSchedule:
    return LearningRateSchedule.model_validate(settings)


@pytest.mark.parametrize("warmup_steps", [0, 1, 12])
@pytest.mark.parametrize(("settings", "decay"), DECAYS.values(), ids=list(DECAYS))
def test_the_rate_of_each_step_is_that_of_torchs_own_schedulers(
    settings: dict[str, Any], decay: Callable[[torch.optim.Optimizer, int], LRScheduler], warmup_steps: int
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=RATE)
    scheduler: LRScheduler = decay(optimizer, STEPS - warmup_steps)
    if warmup_steps:
        for group in optimizer.param_groups:
            group["lr"] = RATE
            del group["initial_lr"]
        rise = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
        scheduler = SequentialLR(optimizer, [rise, decay(optimizer, STEPS - warmup_steps)], milestones=[warmup_steps])
    ours = LearningRate(schedule_of(warmupSteps=warmup_steps, **settings), STEPS)
    for step in range(STEPS):
        assert RATE * ours.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15), step
        optimizer.step()
        scheduler.step()


def test_without_a_schedule_the_rate_is_constant() -> None:
    assert {LearningRate(None, STEPS).factor(step) for step in range(STEPS)} == {1.0}


def test_a_warm_up_that_does_not_end_within_the_job_is_refused() -> None:
    with pytest.raises(WrongInput, match=r"trainer\.learningRateSchedule\.warmupSteps: the job has 50 steps.*got 50"):
        LearningRate(schedule_of(warmupSteps=50), STEPS)
    assert LearningRate(schedule_of(warmupSteps=49), STEPS).factor(49) == 1.0


def test_after_the_last_step_the_factor_stays_what_it_is_at_the_end() -> None:
    ours = LearningRate(schedule_of(type="Linear", minimumFactor=0.25), STEPS)
    assert [ours.factor(step) for step in (STEPS, STEPS + 1, 10 * STEPS)] == [0.25] * 3


def test_every_part_of_a_step_has_the_rate_of_the_step_whatever_a_shard_applied_before_it() -> None:
    schedule = schedule_of(type="Linear")
    rate = StepRate(schedule, stale=StaleLearningRate.CONSTANT, parts_per_step=3)
    rate.know(STEPS)
    steps = LearningRate(schedule, STEPS)
    assert [rate.factor(index, 0) for index in (8, 0, 4)] == [steps.factor(step) for step in (2, 0, 1)]


def test_a_stale_gradient_has_the_rate_of_its_step_divided_by_its_staleness() -> None:
    schedule = schedule_of(type="Linear")
    rate = StepRate(schedule, stale=StaleLearningRate.INVERSE, parts_per_step=1)
    rate.know(STEPS)
    assert rate.factor(10, 4) == LearningRate(schedule, STEPS).factor(10) / 4


@pytest.mark.parametrize(
    ("said", "message"), [([None], "has None steps: all"), ([50, 49], "has 49 steps, and others say 50: all")]
)
def test_workers_that_do_not_agree_on_the_steps_of_the_job_are_refused(said: list[int | None], message: str) -> None:
    rate = StepRate(schedule_of(type="Cosine"), stale=StaleLearningRate.CONSTANT, parts_per_step=1)
    for total_steps in said[:-1]:
        rate.know(total_steps)
    with pytest.raises(WrongInput, match=message):
        rate.know(said[-1])


def test_a_server_without_a_schedule_needs_no_number_of_steps() -> None:
    rate = StepRate(None, stale=StaleLearningRate.CONSTANT, parts_per_step=1)
    rate.know(None)
    assert rate.factor(7, 0) == 1.0


def test_the_local_steps_of_a_part_have_the_rate_of_its_step() -> None:
    module = torch.nn.Linear(2, 1)
    model = FlatModel(module)
    rate = LearningRate(schedule_of(type="Linear"), 4)
    settings = Settings.model_validate({"name": "SGD", "learningRate": 1})
    local = LocalSteps(model, settings, steps=2, full=8, learning_rate=rate)
    parts = Schedule(samples=8, batch_size=8, parts_per_step=1, seed=0, max_steps=4)
    for step, factor in enumerate((1.0, 0.75, 0.5, 0.25)):
        for batch in local.begin(parts.part(step)):
            model.zero_grad()
            module(torch.ones(1, 2)).sum().backward()
            local.weigh(batch, None)
            local.step()
        ((change,), _, _) = local.change()
        torch.testing.assert_close(change, torch.full((3,), 2 * factor))
