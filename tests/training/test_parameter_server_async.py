"""Asynchronous training: every gradient counts exactly once, independent of which worker sends it and how often."""

import threading

import pytest
import torch
from torch import nn

from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.parameter_server import FlatModel
from training.parameter_servers import ASYNC, SGD, enter, in_threads, make_client, make_config, serving

ONE = {"name": "SGD", "learningRate": 1}
"""w <- w - gradient: with whole numbers every sum is exact, in any order."""


def vector_model(length: int = 100) -> FlatModel:
    module = nn.ParameterList([nn.Parameter(torch.zeros(length))])
    return FlatModel(module)


def whole_gradient(index: int, length: int = 100) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(index)
    return (torch.randint(-50, 50, (length,), generator=generator).float(),)


def test_each_gradient_is_applied_exactly_once_by_many_workers_at_a_time() -> None:
    workers, parts = 4, 200
    config = make_config(workers=workers, servers=3, consistency=ASYNC, optimizer=ONE)
    schedule = Schedule(samples=400, batch_size=8, parts_per_step=workers, seed=0, max_steps=50)
    with serving(config) as servers:

        def work(rank: int) -> None:
            flat = vector_model()
            client = enter(make_client(servers, config, rank=rank), flat, join=True)
            client.pull(flat.parameters)
            for index in range(rank, parts, workers):
                client.push_pull(schedule.part(index), whole_gradient(index), flat.parameters)
            client.close()

        in_threads([lambda rank=rank: work(rank) for rank in range(workers)])
        expected = -sum(whole_gradient(index)[0] for index in range(parts))
        reader = vector_model()
        client = make_client(servers, config, rank=0)
        client.connect(reader.layout)
        assert client.initialized
        client.join()
        assert client.pull(reader.parameters) == (parts,) * 3
        assert torch.equal(reader.parameters[0], expected)
        assert all(server.state().applied.floor == parts for server in servers)
        client.close()


def test_a_part_that_comes_again_is_ignored_and_counted_as_late() -> None:
    config = make_config(workers=2, servers=2, consistency=ASYNC, optimizer=ONE)
    schedule = Schedule(samples=400, batch_size=8, parts_per_step=2, seed=0, max_steps=50)
    with serving(config) as servers:
        flat = vector_model()
        first, second = (enter(make_client(servers, config, rank=rank), flat, join=True) for rank in range(2))
        for client in (first, second, first):
            client.push(schedule.part(5), whole_gradient(5))
        first.pull(flat.parameters)
        assert torch.equal(flat.parameters[0], -whole_gradient(5)[0])
        for server in servers:
            assert (server.state().version, server.state().late_gradients) == (1, 2)
            assert server.state().applied.intervals() == [(5, 6)]
            server.begin(2)
            assert server.state().late_gradients == 2, "a counter does not go back when a new round begins"


def test_an_empty_part_counts_as_applied_and_is_no_update() -> None:
    config = make_config(workers=4, servers=2, consistency=ASYNC, optimizer={**SGD, "momentum": 0.9})
    schedule = Schedule(samples=5, batch_size=3, parts_per_step=4, seed=0, max_steps=50)
    empty = next(schedule.part(k) for k in range(8) if schedule.part(k).samples == 0)
    with serving(config) as servers:
        flat = vector_model()
        client = enter(make_client(servers, config), flat, join=True)
        client.push(empty, None)
        for server in servers:
            assert server.state().version == 0
            assert empty.index in server.state().applied


def test_the_first_parameters_win_and_later_workers_read_them() -> None:
    config = make_config(workers=2, servers=2, consistency=ASYNC)
    with serving(config) as servers:
        first, second = vector_model(), vector_model()
        first.parameters[0].fill_(1)
        second.parameters[0].fill_(2)
        clients = [make_client(servers, config, rank=rank) for rank in range(2)]
        clients[0].connect(first.layout)
        clients[1].connect(second.layout)
        assert clients[0].initialize(first.parameters)
        assert not clients[1].initialize(second.parameters)
        clients[1].join()
        clients[1].pull(second.parameters)
        assert torch.equal(second.parameters[0], torch.ones(100))


def test_a_pull_before_the_first_parameters_waits_for_them_and_says_so() -> None:
    config = make_config(workers=2, servers=1, consistency=ASYNC)
    with serving(config) as servers:
        early, late = vector_model(), vector_model()
        late.parameters[0].fill_(3)
        client = make_client(servers, config, rank=0, timeout=0.2)
        client.connect(early.layout)
        client.join()
        puller = threading.Thread(target=client.pull, args=(early.parameters,))
        puller.start()
        puller.join(0.5)  # longer than the time-out: the server's WAIT keeps the worker patient
        assert puller.is_alive()
        assert client.waiting_for == "the first worker's parameters"
        enter(make_client(servers, config, rank=1), late)
        puller.join(5)
        assert torch.equal(early.parameters[0], late.parameters[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_do_not_lose_updates_that_are_smaller_than_their_precision(dtype: torch.dtype) -> None:
    config = make_config(workers=1, servers=2, consistency=ASYNC, optimizer={"name": "SGD", "learningRate": 0.001})
    schedule = Schedule(samples=4000, batch_size=1, parts_per_step=1, seed=0, max_steps=1000)
    with serving(config) as servers:
        flat = FlatModel(nn.ParameterList([nn.Parameter(torch.ones(70, dtype=dtype))]))
        client = enter(make_client(servers, config), flat, join=True)
        for index in range(500):
            client.push(schedule.part(index), (torch.ones(70, dtype=dtype),))
        client.pull(flat.parameters)
        # 1 - 0.001 is 1 in bfloat16: without the 32-bit master nothing would ever change.
        torch.testing.assert_close(flat.parameters[0].float(), torch.full((70,), 0.5), atol=0.002, rtol=0)


def test_a_model_with_several_dtypes_is_one_vector_each() -> None:
    config = make_config(workers=1, servers=3, consistency=ASYNC, optimizer=ONE)
    schedule = Schedule(samples=40, batch_size=1, parts_per_step=1, seed=0, max_steps=10)
    with serving(config) as servers:
        module = nn.ParameterList([nn.Parameter(torch.zeros(33)), nn.Parameter(torch.zeros(7, 5, dtype=torch.float64))])
        flat = FlatModel(module)
        client = enter(make_client(servers, config), flat, join=True)
        client.push_pull(schedule.part(0), (torch.ones(33), 2 * torch.ones(35, dtype=torch.float64)), flat.parameters)
        assert torch.equal(module[0].detach(), -torch.ones(33))
        assert torch.equal(module[1].detach(), -2 * torch.ones(7, 5, dtype=torch.float64))
