"""Figures that change with time, or that several processes know a part of."""

import math

from disttrain_trainer.coordinator.servers import Servers
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member
from disttrain_trainer.parameter_server.gradient_norm import INTERVAL_SECONDS, NormSamples
from disttrain_trainer.runtime.metrics import Rate
from unit.trainer.served import SERVERS, training


def test_a_rate_falls_when_the_next_report_takes_longer_than_the_last_one() -> None:
    rate = Rate(samples=100, seconds=2.0, end=10.0)
    assert [rate.per_second(now) for now in (10.0, 11.0, 12.0, 20.0)] == [50, 50, 50, 10]


def test_servers_that_measure_at_different_times_have_versions_in_common() -> None:
    now = 0.0
    fast, slow = NormSamples(lambda: now), NormSamples(lambda: now)
    for version in range(1, 2000):
        now += INTERVAL_SECONDS / 40
        if fast.due(version):
            fast.add(version, 1.0)
        if slow.due(version):
            now += INTERVAL_SECONDS / 10
            slow.add(version, 1.0)
        if version > 200:
            assert {version for version, _ in fast.newest} & {version for version, _ in slow.newest}
    assert len(fast.newest) == 2


class _Nowhere:
    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        raise AssertionError


def test_the_norm_of_a_step_is_combined_of_what_all_servers_measured_at_the_same_version() -> None:
    servers = Servers(sender=_Nowhere(), count=2)
    state = {"generation": 1, "applied": []}
    servers.know(0, {**state, "gradient_norms": [[4, 9.0], [8, 1.0]]})
    assert servers.gradient_norm is None, "one server knows its part only"
    servers.know(1, {**state, "gradient_norms": [[2, 5.0], [4, 16.0]]})
    assert servers.gradient_norm == math.hypot(3, 4)
    servers.know(1, {**state, "gradient_norms": [[5, 16.0]]})
    assert servers.gradient_norm is None


def test_the_gradient_norm_of_a_round_is_not_mixed_with_that_of_the_one_before() -> None:
    servers = Servers(sender=_Nowhere(), count=2)
    for index in range(2):
        servers.know(index, {"generation": 1, "applied": [], "gradient_norms": [[8, 1.0]]})
    servers.know(0, {"generation": 2, "applied": [], "gradient_norms": [[8, 9.0]]})
    assert servers.gradient_norm is None
    servers.know(1, {"generation": 2, "applied": [], "gradient_norms": [[8, 16.0]]})
    assert servers.gradient_norm == 5


def test_the_gradient_norm_stays_known_while_only_one_server_has_reported_newer_ones() -> None:
    table = training()

    def measured(server: int, *norms: tuple[int, float]) -> None:
        state = {"type": MessageType.STATE, **table.state(SERVERS[server]), "gradient_norms": list(norms)}
        table.training.on_message(SERVERS[server], state, 0)

    measured(0, (4, 9.0))
    measured(1, (4, 16.0))
    assert table.tracker.gradient_norm == 5
    measured(0, (8, 36.0), (12, 1.0))
    assert table.tracker.gradient_norm == 5
    measured(1, (8, 64.0), (12, 0.0))
    assert table.tracker.gradient_norm == 1


def test_the_norm_by_which_a_step_is_clipped_is_known_as_soon_as_the_servers_have_it() -> None:
    table = training(maxGradientNorm=1.0)
    for shard, value in enumerate((9.0, 16.0)):
        part = {"shard": shard, "term": 1, "version": 1, "scale": 1.0, "nodes": [[[0, shard, value]]]}
        message = {"type": MessageType.NORM, "generation": 1, "norms": [part]}
        table.training.on_message(SERVERS[shard], message, 0)
    assert table.tracker.gradient_norm == 5
