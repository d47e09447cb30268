"""Portions of a part: how many there are, what they weigh together, and what a job says that has too many."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from configs import config_of
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import resuming
from disttrain_trainer.data.inner_batches import Portions
from disttrain_trainer.data.schedule import DataSet, Schedule
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.loop.meter import Meter
from disttrain_trainer.model import task
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.strategies.accumulation import Accumulation


def config(**trainer: Any) -> JobConfig:
    chosen = {"model": "m:m", "dataset": "m:d", "optimizer": {"name": "SGD", "learningRate": 0.1}, "maxSteps": 9}
    return config_of({"strategy": {"type": "DataParallel"}, "trainer": chosen | {"batchSize": 8} | trainer})


def test_a_part_has_its_portions_and_one_without_samples_is_itself() -> None:
    job = config(gradientAccumulationSteps=4, partsPerStep=2)
    schedule, portions = Schedule.of(job, 10), Portions(job)
    assert [one.samples for one in portions.of(schedule.part(0))] == [1, 1, 1, 1]
    assert [one.samples for one in portions.of(schedule.part(2))] == [1, 1], "a part of the last batch"
    empty = replace(schedule.part(0), samples=0)
    assert portions.of(empty) == (empty,)
    whole = schedule.part(0)
    assert Portions(config()).of(whole) == (whole,)


def test_the_gradient_of_portions_is_the_mean_over_what_they_weigh() -> None:
    model = nn.Linear(1, 1, bias=False)
    flat, job = FlatModel(model), config(gradientAccumulationSteps=2)
    accumulation = Accumulation(flat, Portions(job))
    part = Schedule.of(job, 8).part(0)
    for weights, expected in (((None, None), 2.0), ((3.0, 1.0), 1.5), ((0.0, 2.0), 3.0)):
        flat.zero_grad()
        for portion, weight, slope in zip(accumulation.begin(part), weights, (1.0, 3.0), strict=True):
            loss = accumulation.weigh(slope * model.weight.sum(), portion, weight)
            if weight != 0:
                loss.backward()
            accumulation.after(portion)
        total = accumulation.mean(flat.gradients())
        assert float(flat.gradients()[0]) == pytest.approx(expected)
        assert total == (None if weights[0] is None else sum(weights))


def test_more_portions_than_samples_of_a_part_are_refused_with_the_arithmetic() -> None:
    job = config(gradientAccumulationSteps=2).model_copy(update={"workers": 5})  # as of a job that begun with so many
    with pytest.raises(
        WrongInput, match=r"gradientAccumulationSteps: .* 8 / 5 samples, fewer than 2 portions: .* 10 or"
    ):
        task.schedule_of(job, 100, None)


def test_the_losses_of_all_portions_count_and_a_part_is_forgotten_whole() -> None:
    sent: list[dict[str, Any]] = []
    job = config(gradientAccumulationSteps=2, maxSteps=1)
    metrics = Metrics(SimpleNamespace(config=job, role=Role.WORKER, rank=0))  # type: ignore[arg-type]
    meter = Meter(name="worker-0", metrics=metrics, total_steps=1, send=sent.append)
    part = Schedule.of(job, 8).part(0)
    for again in (False, True):
        for portion, loss in zip(Portions(job).of(part), (1.0, 5.0), strict=True):
            meter.add(portion, loss=loss, values={"accuracy": loss})
        if not again:
            meter.forget_last()
    meter.report(step=1, epoch=1, now=0.0)
    (report,) = sent
    assert (report["samples"], report["loss"]) == (8, 24.0)
    assert [weighted for _, weighted, _ in report["final"]] == [4.0, 20.0]
    assert len({number for number, _, _ in report["final"]}) == 2
    assert report["values"] == {"accuracy": (24.0, 8.0)}


def test_a_resume_may_change_the_portions_and_the_largest_norm_and_names_them() -> None:
    before, now = config(), config(gradientAccumulationSteps=2, maxGradientNorm=0.5)
    for section in (resuming.state_of, lambda job: resuming.data_of(job, DataSet(10))):
        assert resuming.misfit(section(before), section(now)) is None
    assert resuming.changes(resuming.record_of(before), resuming.record_of(now)) == [
        "trainer.gradientAccumulationSteps: 1 -> 2",
        "trainer.maxGradientNorm: none -> 0.5",
    ]


def test_an_older_trainer_is_told_that_it_does_not_know_the_fields() -> None:
    for job, words in (
        (config(gradientAccumulationSteps=2), "gradientAccumulationSteps is set"),
        (config(maxGradientNorm=0.5), "trainer.maxGradientNorm is set"),
    ):
        assert words in job.encode()
        assert JobConfig.decode(job.encode()) == (job, ())
    assert "does not know" not in config().encode()


def test_unequal_portions_add_up_as_in_one_backward() -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(3, 1), torch.randn(7, 3)
    flat, job = FlatModel(model), config(gradientAccumulationSteps=3, batchSize=7)
    accumulation = Accumulation(flat, Portions(job))
    part = Schedule.of(job, 7).part(0)
    for portion in accumulation.begin(part):
        accumulation.weigh(model(data[torch.tensor(portion.indices)]).square().mean(), portion, None).backward()
    found = flat.gradients()[0].clone()
    flat.zero_grad()
    model(data).square().mean().backward()
    torch.testing.assert_close(found, flat.gradients()[0])
