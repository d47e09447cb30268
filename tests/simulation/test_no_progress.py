"""A job that makes no step comes to an end, whatever its pods say that they die of: by its limit, or by a deadline.

Exit code 75 counts as no failure, so it could go on for ever: pods lose their peers, are replaced, meet, and lose one another again.
Not here: failures that count by themselves, and disruptions, which do not count however many there are (test_any_order.py).
"""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.api.names import Role
from simulation.cluster import START, Cluster, Operator
from simulation.jobs import jobs
from width import WIDE

ROUND = timedelta(seconds=20)
"""Between two losses, with time for back-offs of a few failures."""


def cluster_and_operator(body: dict[str, Any]) -> tuple[Cluster, Operator]:
    """A job that made its first steps, with deadlines that do not end it before the limit does."""
    body["spec"]["runPolicy"] |= {"progressDeadlineSeconds": 100_000, "startupDeadlineSeconds": 3600}
    cluster = Cluster(body)
    return cluster, Operator(cluster)


def see(cluster: Cluster, operator: Operator, *, readable: bool, passes: int = 4) -> None:
    for _ in range(passes):
        operator.see_all()
        if readable:
            operator.poll()
        operator.reconcile()
        for name in list(cluster.pods):
            cluster.vanish(name)


def come_along(cluster: Cluster, *, but: str = "") -> None:
    for name in list(cluster.pods):
        if name != but:
            cluster.run(name)
            cluster.run(name)


@pytest.mark.timeout(0 if WIDE else 120)
@given(jobs(), st.data())
@settings(
    max_examples=300 if WIDE else 15, deadline=None, derandomize=not WIDE, suppress_health_check=list(HealthCheck)
)
def test_peers_that_lose_one_another_for_ever_use_the_limit_up(body: dict[str, Any], data: st.DataObject) -> None:
    cluster, operator = cluster_and_operator(body)
    see(cluster, operator, readable=True)
    come_along(cluster)
    cluster.train(5, checkpoint=True)
    see(cluster, operator, readable=True)
    readable = data.draw(st.booleans(), label="the operator can read the master")
    limit, pods = body["spec"]["runPolicy"]["backoffLimit"], len(cluster.pods)
    losses = 0
    while not cluster.finished:
        running = sorted(
            name
            for name, pod in cluster.pods.items()
            if not pod.done and (readable is False or pod.role is not Role.MASTER)
        )
        for name in data.draw(st.sets(st.sampled_from(running), min_size=1), label="lost"):
            cluster.end(name, 75)
            losses += 1
        see(cluster, operator, readable=readable)
        cluster.now += ROUND
        see(cluster, operator, readable=readable)
        come_along(cluster)
        cluster.now += ROUND
        see(cluster, operator, readable=readable)
        # Each pod once for nothing, and once with each failure that counts.
        assert losses <= (limit + 2) * pods + pods, "restarts without end"
    assert cluster.status.is_true("Failed")


@pytest.mark.timeout(0 if WIDE else 120)
@given(jobs(), st.data())
@settings(
    max_examples=100 if WIDE else 10, deadline=None, derandomize=not WIDE, suppress_health_check=list(HealthCheck)
)
def test_peers_that_give_up_while_one_never_comes_do_not_use_the_limit_up_but_the_startup_deadline(
    body: dict[str, Any], data: st.DataObject
) -> None:
    cluster, operator = cluster_and_operator(body)
    see(cluster, operator, readable=True)
    absent = data.draw(st.sampled_from(sorted(cluster.pods)), label="absent")
    while not cluster.finished:
        come_along(cluster, but=absent)
        see(cluster, operator, readable=True, passes=2)
        cluster.now += timedelta(seconds=data.draw(st.sampled_from((20, 70, 300)), label="wait"))
        there = sorted(name for name in cluster.pods if name != absent)
        for name in data.draw(st.sets(st.sampled_from(there)), label="lost") if there else ():
            cluster.end(name, 75)
        see(cluster, operator, readable=True)
        cluster.now += ROUND
        see(cluster, operator, readable=True)
        assert cluster.now - START <= timedelta(seconds=3600 + 400), (
            "the readiness of others moves the startup deadline"
        )
    failed = cluster.status.condition("Failed")
    counts = "command" in body["spec"]["trainer"]
    assert failed is not None
    assert failed.reason in ("StartupDeadlineExceeded", *(["BackoffLimitExceeded"] if counts else []))
