"""Synchronous training on parameter servers is the training of one process, however parts and model are divided."""

import random
import time

import pytest
import torch

from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.parameter_server import FlatModel
from training.parameter_servers import (
    ADAM,
    ADAMW,
    MOMENTUM,
    NESTEROV,
    SGD,
    enter,
    make_client,
    make_config,
    serving,
    train_alone,
    train_sync,
)

OPTIMIZERS = {
    "SGD": (SGD, lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (MOMENTUM, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01)),
    "Nesterov": (NESTEROV, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)),
    "Adam": (ADAM, lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01)),
    "AdamW": (ADAMW, lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.999), weight_decay=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(torch.float32, 1e-6, id="fp32"), pytest.param(torch.float64, 1e-12, id="fp64")],
)
def test_50_steps_equal_those_of_one_process_on_the_whole_batch(
    name: str, servers: int, workers: int, dtype: torch.dtype, tolerance: float
) -> None:
    settings, reference = OPTIMIZERS[name]
    # 40 samples in batches of 12: the last batch of an epoch has 4, and parts are uneven.
    (result,) = train_sync(workers=workers, servers=servers, optimizer=settings, steps=50, dtype=dtype)
    alone = train_alone(optimizer=reference, steps=50, dtype=dtype, samples=40, batch_size=12)
    torch.testing.assert_close(result, alone, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_number_of_servers_changes_not_a_bit(name: str) -> None:
    settings, _ = OPTIMIZERS[name]
    (one,), *others = (train_sync(workers=2, servers=servers, optimizer=settings, steps=20) for servers in (1, 2, 3, 5))
    for (other,) in others:
        assert torch.equal(one, other)


def test_the_order_in_which_gradients_come_changes_not_a_bit() -> None:
    def shuffled(seed: int):
        randomness = random.Random(seed)
        delays = {(rank, step): randomness.random() * 0.004 for rank in range(3) for step in range(20)}
        return lambda rank, step: time.sleep(delays[rank, step])

    results = [
        train_sync(workers=3, servers=2, optimizer=ADAM, steps=20, before_push=shuffled(seed)) for seed in range(4)
    ]
    assert all(torch.equal(result[0], results[0][0]) for result in results)


def test_the_protocol_adds_less_than_one_percent_to_the_gradients_and_parameters_themselves() -> None:
    steps, length = 20, 1 << 16
    config = make_config(workers=1, servers=2)
    schedule = Schedule(samples=100, batch_size=2, parts_per_step=1, seed=0, max_steps=100)
    with serving(config) as servers:
        flat = FlatModel(torch.nn.ParameterList([torch.zeros(length)]))
        client = enter(make_client(servers, config), flat)
        client.pull(flat.parameters, step=0)
        client.join()  # a server counts what it sent after the client may have it: the next answer says that it has counted
        before = [(server.state().bytes_in, server.state().bytes_out) for server in servers]
        for step in range(steps):
            client.push_pull(schedule.part(step), flat.gradients(), flat.parameters, step + 1)
        client.join()
        after = [(server.state().bytes_in, server.state().bytes_out) for server in servers]
        least = steps * length * 4
        for way in (0, 1):
            moved = sum(b[way] - a[way] for a, b in zip(before, after, strict=True))
            assert least <= moved <= 1.01 * least
        assert sum(server.state().shard_bytes for server in servers) == length * 4


def test_a_batch_with_fewer_samples_than_workers_leaves_some_parts_empty_and_the_result_right() -> None:
    (result,) = train_sync(workers=3, servers=2, optimizer=MOMENTUM, steps=30, samples=13, batch_size=6)
    alone = train_alone(optimizer=OPTIMIZERS["momentum"][1], steps=30, dtype=torch.float32, samples=13, batch_size=6)
    torch.testing.assert_close(result, alone, atol=1e-6, rtol=0)
