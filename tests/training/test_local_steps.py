"""localSteps: workers take steps of their own and push the change; held against the definition, written down once more in plain torch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from disttrain.api.names import Role
from disttrain.api.optimizer import Optimizer as Settings
from disttrain_trainer.data.schedule import BatchPart, Schedule
from disttrain_trainer.strategies.local_steps import LocalSteps
from training.job import Job, checkpoints, digits
from training.parameter_servers import (
    Worker,
    enter,
    in_threads,
    make_client,
    make_config,
    mlp,
    regression,
    serving,
    users,
)

SAMPLES, BATCH, INNER, STEPS = 50, 24, 4, 9
OUTER = {"learningRate": 0.7, "momentum": 0.9, "nesterov": True}
StepperOf = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def loss_of(module: nn.Module, x: torch.Tensor, y: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
    at = torch.from_numpy(np.array(indices))
    return nn.functional.mse_loss(module(x[at]), y[at])


def written_down(
    *, parts: int, inner_of: StepperOf, outer_of: StepperOf, samples: int = SAMPLES, steps: int = STEPS
) -> torch.Tensor:
    """The definition: in each step every part starts from the same parameters and takes a step on each of its batches, with a stepper that
    goes on from step to step; the outer stepper's gradient is the mean of start - end, weighted by samples."""
    schedule = Schedule(samples=samples, batch_size=BATCH, parts_per_step=parts, seed=3, max_steps=steps)
    x, y = regression(samples, torch.float64)
    whole, workers = mlp(torch.float64), [mlp(torch.float64) for _ in range(parts)]
    steppers = [inner_of(list(worker.parameters())) for worker in workers]
    outer = outer_of(list(whole.parameters()))
    for step in range(steps):
        changes = [torch.zeros_like(parameter) for parameter in whole.parameters()]
        for number, (worker, stepper) in enumerate(zip(workers, steppers, strict=True)):
            part = schedule.part(step * parts + number)
            if not part.samples:
                continue
            worker.load_state_dict(whole.state_dict())
            batches = min(INNER, part.samples // (2 if 2 * parts * INNER <= BATCH else 1)) or 1
            for indices in np.array_split(part.indices, [part.samples * b // batches for b in range(1, batches)]):
                stepper.zero_grad()
                loss_of(worker, x, y, indices).backward()
                stepper.step()
            for change, start, end in zip(changes, whole.parameters(), worker.parameters(), strict=True):
                change += (start - end).detach() * part.samples / part.batch_samples
        for parameter, change in zip(whole.parameters(), changes, strict=True):
            parameter.grad = change
        outer.step()
    return torch.cat([parameter.detach().flatten() for parameter in whole.parameters()])


def ours(*, workers: int, servers: int, inner: dict[str, object], outer: dict[str, object]) -> torch.Tensor:
    """The same by workers and servers."""
    policy = {"consistency": "Sync", "localSteps": INNER, "outerOptimizer": outer}
    config = make_config(workers=workers, servers=servers, consistency=policy, optimizer=inner)
    schedule = Schedule(samples=SAMPLES, batch_size=BATCH, parts_per_step=workers, seed=3, max_steps=STEPS)
    with serving(config) as shards:

        def work(rank: int) -> torch.Tensor:
            worker = Worker(torch.float64, SAMPLES)
            local = LocalSteps(worker.flat, Settings.model_validate(inner), steps=INNER, full=BATCH // workers)
            client = enter(make_client(shards, config, rank=rank), worker.flat, join=True)
            client.pull(worker.flat.parameters, step=0)
            for step in range(STEPS):
                part = schedule.part(step * workers + rank)
                batches: list[BatchPart] = list(local.begin(part))
                for batch in batches if part.samples else []:
                    worker.flat.zero_grad()
                    loss_of(worker.module, worker.x, worker.y, batch.indices).backward()
                    local.weigh(batch, None)
                    local.step()
                change, _, _ = local.change()
                client.push_pull(part, change if part.samples else None, worker.flat.parameters, step + 1)
            client.close()
            return worker.flat.parameters[0].clone()

        return in_threads([lambda rank=rank: work(rank) for rank in range(workers)])[0]


@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (1, 3), (2, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize(
    ("inner", "inner_of"),
    [
        ({"name": "SGD", "learningRate": 0.05}, lambda p: torch.optim.SGD(p, lr=0.05)),
        ({"name": "AdamW", "learningRate": 0.01}, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0)),
    ],
    ids=["SGD", "AdamW"],
)
def test_any_number_of_workers_and_servers_takes_the_steps_of_the_definition(
    workers: int, servers: int, inner: dict[str, object], inner_of: StepperOf
) -> None:
    expected = written_down(
        parts=workers, inner_of=inner_of, outer_of=lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)
    )
    found = ours(workers=workers, servers=servers, inner=inner, outer=OUTER)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_one_worker_with_an_outer_step_of_1_trains_as_one_without_servers() -> None:
    """Local steps are steps: nothing else happens to the parameters."""
    inner, outer = {"name": "SGD", "learningRate": 0.05}, {"learningRate": 1, "momentum": 0, "nesterov": False}
    schedule = Schedule(samples=SAMPLES, batch_size=BATCH, parts_per_step=1, seed=3, max_steps=STEPS)
    alone = mlp(torch.float64)
    x, y = regression(SAMPLES, torch.float64)
    stepper = torch.optim.SGD(alone.parameters(), lr=0.05)
    for step in range(STEPS):
        part = schedule.part(step)
        batches = min(INNER, part.samples // 2) or 1
        for indices in np.array_split(part.indices, [part.samples * b // batches for b in range(1, batches)]):
            stepper.zero_grad()
            loss_of(alone, x, y, indices).backward()
            stepper.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in alone.parameters()])
    torch.testing.assert_close(ours(workers=1, servers=2, inner=inner, outer=outer), expected, atol=1e-12, rtol=0)


def test_a_job_of_processes_trains_the_definition_also_when_a_worker_is_lost(tmp_path: Path) -> None:
    # The inner rule has no state, so that it does not matter which worker computes a part, nor that one is lost.
    steps = 200
    policy = {"consistency": "Sync", "localSteps": INNER, "outerOptimizer": OUTER}
    (tmp_path / "users.py").write_text(users(SAMPLES))
    spec = digits(
        strategy={"type": "ParameterServer", "parameterServer": policy},
        parameterServer={"replicas": 2},
        worker={"replicas": 2},
        trainer={
            "model": "users:model", "dataset": "users:dataset", "loss": "users:loss", "evaluate": None, "epochs": None,
            "optimizer": {"name": "SGD", "learningRate": 0.05}, "maxSteps": steps, "batchSize": BATCH, "seed": 3,
        },
        **checkpoints(1000),
    )  # fmt: skip
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        job.until(lambda progress: progress.step >= 5)
        job.kill(Role.WORKER, 1)
        progress = job.complete()
    assert progress.step == steps
    expected = written_down(
        parts=2,
        inner_of=lambda p: torch.optim.SGD(p, lr=0.05),
        outer_of=lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
        steps=steps,
    )
    model = mlp(torch.float64)
    model.load_state_dict(load_file(tmp_path / "checkpoints" / "model.safetensors"))
    found = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
