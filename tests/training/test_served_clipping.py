"""Servers clip by the norm of the whole gradient, of which each has a part, with the bits of one server."""

import threading

import pytest
import torch
from torch import nn

from cluster.processes import wait_for
from disttrain_trainer.coordinator.gradient_norms import GradientNorms
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.errors import Refused
from disttrain_trainer.parameter_server.client import GradientInfo, Tried
from disttrain_trainer.parameter_server.compression import of
from training.parameter_servers import (
    ADAMW,
    ASYNC,
    SGD,
    SYNC,
    Worker,
    enter,
    make_client,
    make_config,
    serving,
    train_alone,
    train_sync,
)
from training.test_copies_of_shards import Copies

STEPS = 50
COUNTS = {"steps": STEPS, "samples": 41, "batch_size": 12}
"""Every fourth batch has 5 samples."""


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, betas=(0.8, 0.999), weight_decay=0.1)


@pytest.mark.parametrize("clip", [0.02, 0.2])
def test_any_number_of_workers_and_servers_is_one_server_to_the_last_bit(clip: float) -> None:
    """Of 3 workers a part is another one than of 2: there the gradient is rounded in another way."""
    for workers in (2, 3):
        found = [
            torch.cat(train_sync(workers=workers, servers=servers, optimizer=ADAMW, clip=clip, **COUNTS))
            for servers in (1, 2, 3)
        ]
        assert all(torch.equal(one, found[0]) for one in found[1:])


@pytest.mark.parametrize(
    ("optimizer", "theirs", "dtype", "tolerance"),
    [(SGD, sgd, torch.float32, 1e-6), (ADAMW, adamw, torch.float64, 1e-12)],
    ids=["sgd-fp32", "adamw-fp64"],
)
def test_a_clipped_sum_is_torchs(optimizer, theirs, dtype, tolerance) -> None:
    norms: list[float] = []
    alone = train_alone(optimizer=theirs, dtype=dtype, clip=0.4, norms=norms, **COUNTS)
    assert min(norms) < 0.4 < max(norms), "some steps are clipped, some are not"
    for servers in (1, 2, 3):
        found = train_sync(workers=2, servers=servers, optimizer=optimizer, dtype=dtype, clip=0.4, **COUNTS)
        torch.testing.assert_close(torch.cat(found), alone, atol=tolerance, rtol=0)


def test_async_clips_the_gradient_of_a_part_by_the_norm_that_the_worker_sends() -> None:
    """One worker: each part is the whole batch. A compressed gradient is clipped by the norm of what is sent."""
    for compress in (None, {"type": "BFloat16"}):
        consistency = ASYNC | ({"compression": compress} if compress else {})
        config = make_config(servers=2, consistency=consistency, clip=0.4)
        schedule = Schedule(samples=41, batch_size=12, parts_per_step=1, seed=3, max_steps=STEPS)
        worker, alone = Worker(samples=41), Worker(samples=41)
        stepper = sgd(list(alone.module.parameters()))
        with serving(config) as servers:
            compression = of(config.strategy.parameter_server.compression, worker.flat.parameters)
            client = enter(make_client(servers, config, compression=compression), worker.flat, join=True)
            client.pull(worker.flat.parameters)
            for step in range(STEPS):
                part = schedule.part(step)
                info = GradientInfo(clips=True)
                client.push_pull(part, worker.gradient(part), worker.flat.parameters, info=info)
                alone.gradient(part)
                if compress:
                    for parameter in alone.module.parameters():
                        parameter.grad.copy_(parameter.grad.bfloat16())
                nn.utils.clip_grad_norm_(alone.module.parameters(), 0.4)
                stepper.step()
            with pytest.raises(Refused, match="without the norm"):
                client.push(schedule.part(0), worker.gradient(schedule.part(0)))
        torch.testing.assert_close(worker.flat.parameters[0], alone.flat.parameters[0], atol=1e-6, rtol=0)


def test_a_step_that_waits_for_its_norm_is_pulled_and_copied_only_after_it() -> None:
    """The other shard's part is missing: the server says what it waits for, within the worker's patience."""
    config = make_config(servers=2, clip=1.0)
    part = Schedule(samples=12, batch_size=12, parts_per_step=1, seed=3, max_steps=2).part(0)
    worker = Worker()
    with serving(config, on_sum=lambda: None) as servers:
        client = enter(make_client(servers, config), worker.flat, join=True)
        client.pull(worker.flat.parameters, step=0)
        client.push(part, worker.gradient(part))
        before = [parameters.clone() for parameters in worker.flat.parameters]
        assert client.try_pull(worker.flat.parameters, step=1, patience_seconds=0.05) is Tried.NONE
        assert all(len(server.norm_parts()) == 1 and "nodes" in server.norm_parts()[0] for server in servers)
        assert servers[0].snapshot(step=0).version == 0
        with pytest.raises(RuntimeError, match="not wanted any more"):
            servers[0].snapshot(step=1, wanted=lambda: False)
        copying = threading.Thread(target=servers[0].snapshot, kwargs={"step": 1})
        copying.start()
        copying.join(0.2)
        assert copying.is_alive(), "the master counts the step"
        for server in servers:
            server.take_norm(1, 7, 0.1)  # of another step
            server.take_norm(2, 1, 0.1)  # of another round
            assert server.state().version == 0
            server.take_norm(1, 1, 4.0)
            server.take_norm(1, 1, 5.0)
            assert [said["norm"] for said in server.norm_parts()] == [4.0]
        copying.join(10)
        assert client.pull(worker.flat.parameters, step=1) == (1, 1)
    assert not any(torch.equal(*pair) for pair in zip(before, worker.flat.parameters, strict=True))


@pytest.mark.parametrize("begun", ["before the step", "after it"])
def test_a_copy_knows_the_norm_of_the_last_step_and_says_it_to_a_new_master_once_it_is_promoted(begun: str) -> None:
    """Shard 1 waits for the norm that server 0 has made the step with; server 0 and the master are lost."""
    config = make_config(servers=2, clip=1.0, consistency=SYNC | {"replication": 2})
    part = Schedule(samples=12, batch_size=12, parts_per_step=1, seed=3, max_steps=2).part(0)
    worker, copies = Worker(), Copies()
    with serving(config, on_sum=lambda: None) as servers:
        client = enter(make_client(servers, config), worker.flat, join=True)
        client.pull(worker.flat.parameters, step=0)
        if begun == "before the step":
            copies.order(servers, 0, 1)
        client.push(part, worker.gradient(part))
        servers[0].take_norm(1, 1, 4.0)
        if begun == "after it":
            copies.order(servers, 0, 1)
        wait_for("the copy to have the step", lambda: servers[1].newest_version == 1, 20)
        servers[1].promote([(0, 2)])
        said = servers[1].norm_parts()
        assert [(one["shard"], one["term"], one["version"], one.get("norm")) for one in said] == [
            (0, 2, 1, 4.0),
            (1, 1, 1, None),
        ]
        of_new_master = GradientNorms(shards=2, serves=lambda *_: True)
        assert of_new_master.know(1, {"generation": 1, "norms": said}) == [(1, 4.0)]
