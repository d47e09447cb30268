"""Bounded staleness (SSP): what each worker may see, and that no worker waits for a lost one."""

import random
import threading
import time

import pytest
import torch

from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.errors import PeerLost
from disttrain_trainer.parameter_server import ShardedClient, ShardServer
from disttrain_trainer.parameter_server.consistency import BoundedStaleness
from training.parameter_servers import bounded, enter, in_threads, make_client, make_config, serving
from training.test_parameter_server_async import ONE, vector_model

REFUSED_WITHIN = 30
"""Seconds in which a worker that runs ahead has long met the gate."""


class Leads(list[int]):
    """c - min at every START, on every shard."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = threading.Event()
        """A worker was sent back from the gate: the one before that has started with the largest lead that there may be."""


@pytest.fixture
def leads(monkeypatch: pytest.MonkeyPatch) -> Leads:
    seen = Leads()
    start = BoundedStaleness.start

    def logged(self: BoundedStaleness, worker: int, clock: int, step: int | None) -> bool:
        minimum = self.gate
        allowed = start(self, worker, clock, step)
        if allowed:
            seen.append(clock - minimum)
        else:
            seen.refused.set()
        return allowed

    monkeypatch.setattr(BoundedStaleness, "start", logged)
    return seen


def joined(servers: list[ShardServer], config, rank: int, length: int) -> tuple[ShardedClient, torch.Tensor]:
    flat = vector_model(length)
    client = enter(make_client(servers, config, rank=rank), flat, join=True)
    return client, flat.parameters[0]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_worker_starts_more_than_s_ahead_and_each_read_contains_what_it_must(staleness: int, leads: Leads) -> None:
    workers, iterations, length = 4, 400, 64
    config = make_config(workers=workers, servers=2, consistency=bounded(staleness), optimizer=ONE)
    schedule = Schedule(samples=4000, batch_size=workers, parts_per_step=workers, seed=0, max_steps=iterations)
    taus: list[int] = []
    with serving(config, on_staleness=taus.append) as servers:

        def work(rank: int) -> None:
            randomness = random.Random(rank)
            client, parameters = joined(servers, config, rank, length)
            # Worker q counts its own updates in the coordinates q, q + workers …, which lie on both shards.
            gradient = torch.zeros(length)
            gradient[rank::workers] = -1
            ready.wait()
            client.pull((parameters,))
            for clock in range(iterations):
                seen = parameters.view(-1, workers).min(0).values
                assert client.clock == clock
                assert seen[rank] == clock, "a worker reads its own writes"
                assert seen.min() >= clock - staleness, f"at clock {clock} only {seen.tolist()} were seen"
                if rank == 0 and clock == 0:
                    assert leads.refused.wait(REFUSED_WITHIN), "no worker runs ahead of this one up to the gate"
                if randomness.random() < 0.1:
                    time.sleep(randomness.random() * 0.004)
                client.push_pull(schedule.part(clock * workers + rank), (gradient,), (parameters,))
            client.leave()
            client.close()

        ready = threading.Barrier(workers)
        in_threads([lambda rank=rank: work(rank) for rank in range(workers)])
        assert len(leads) == 2 * workers * (iterations + 1)
        assert max(leads) == staleness, "the bound is reached, and never exceeded"
        assert len(taus) == 2 * workers * iterations
        # Between a worker's read and its update, each other worker is at most 2s + 1 iterations busy.
        assert 0 <= min(taus) <= max(taus) <= (workers - 1) * (2 * staleness + 1)
        for server in servers:
            assert server.state().max_staleness_seen == staleness
            assert server.state().version == workers * iterations


def test_workers_that_are_killed_leave_or_join_neither_block_the_others_nor_break_the_bound(leads: Leads) -> None:
    staleness, workers, lives = 2, 4, 12
    config = make_config(workers=workers, servers=2, consistency=bounded(staleness), optimizer=ONE)
    schedule = Schedule(samples=400, batch_size=workers, parts_per_step=workers, seed=0, max_steps=100_000)
    numbers = iter(range(100_000))
    together = threading.Barrier(workers)
    with serving(config) as servers:

        def work(rank: int) -> int:
            randomness = random.Random(rank)
            done = 0
            for life in range(lives):
                client, parameters = joined(servers, config, rank, 64)
                if life == 0:
                    together.wait()
                client.pull((parameters,))
                if life == rank == 0:
                    assert leads.refused.wait(REFUSED_WITHIN), "no worker runs ahead of this one up to the gate"
                for _ in range(staleness + 1 if life == 0 else randomness.randrange(1, 40)):
                    if randomness.random() < 0.1:
                        time.sleep(0.002)
                    client.push_pull(schedule.part(next(numbers)), (torch.zeros(64),), (parameters,))
                    done += 1
                match randomness.randrange(3):
                    case 0:
                        client.leave()
                        time.sleep(0.01)
                        client.join()
                        client.close()
                    case 1:
                        client.close()
                    case 2:
                        client.close(goodbye=False)
            return done

        done = in_threads([lambda rank=rank: work(rank) for rank in range(workers)])
        assert min(done) > 0
        assert max(leads) == staleness
        assert all(server.state().version == sum(done) for server in servers)


def test_who_joins_starts_at_the_slowest_worker() -> None:
    config = make_config(workers=3, servers=2, consistency=bounded(3), optimizer=ONE)
    schedule = Schedule(samples=400, batch_size=3, parts_per_step=3, seed=0, max_steps=100)
    with serving(config) as servers:
        first, parameters = joined(servers, config, 0, 64)
        for index in range(7):
            first.push_pull(schedule.part(index), (torch.zeros(64),), (parameters,))
        second, parameters = joined(servers, config, 1, 64)
        assert second.clock == 7
        for index in range(7, 9):
            second.push_pull(schedule.part(index), (torch.zeros(64),), (parameters,))
        assert second.clock == 9
        third, _ = joined(servers, config, 2, 64)
        assert third.clock == 7


def test_a_fast_worker_gains_nothing_by_being_idle_for_a_moment_nor_by_a_new_connection() -> None:
    config = make_config(workers=2, servers=2, consistency=bounded(1), optimizer=ONE, startup_timeout=0.5)
    schedule = Schedule(samples=400, batch_size=2, parts_per_step=2, seed=0, max_steps=100)
    with serving(config) as servers:
        slow, _ = joined(servers, config, 0, 64)
        fast, parameters = joined(servers, config, 1, 64)
        for index in range(2):
            fast.pull((parameters,))
            fast.push(schedule.part(index), (torch.zeros(64),))
            fast.leave()
            assert fast.join() == index + 1
        again = make_client(servers, config, rank=1, clock=fast.clock)
        again.connect(vector_model(64).layout)
        assert again.join() == 2
        with pytest.raises(PeerLost, match=r"waited 0.5 s for worker 0 to complete iteration 0"):
            again.pull((parameters,))
        assert [server.state().max_staleness_seen for server in servers] == [1, 1]
        slow.close()


def test_a_worker_at_the_gate_goes_on_when_the_slow_one_is_dropped_and_says_until_then_whom_it_waits_for() -> None:
    config = make_config(workers=2, servers=2, consistency=bounded(0), optimizer=ONE)
    schedule = Schedule(samples=400, batch_size=2, parts_per_step=2, seed=0, max_steps=100)
    with serving(config) as servers:
        fast, parameters = joined(servers, config, 0, 64)
        slow, _ = joined(servers, config, 1, 64)
        waiter = threading.Thread(target=fast.push_pull, args=(schedule.part(0), (torch.zeros(64),), (parameters,)))
        waiter.start()
        waiter.join(0.3)
        assert waiter.is_alive()
        for server in servers:
            server.drop(1)
        waiter.join(5)
        assert not waiter.is_alive()
        assert fast.clock == 1
        slow.close(goodbye=False)
