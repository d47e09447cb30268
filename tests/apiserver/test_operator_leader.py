"""Two operators, one Lease: one acts, the other takes over when the first is gone without a word."""

from __future__ import annotations

import time

from apiserver.operating import JOBS, PODS, Operator, Rest, eventually, job, pod_names
from cluster.controlplane import ControlPlane

PROMPT = 8
"""Seconds for an end in which nothing has to be waited for: half of the 15 s after which a Lease runs out."""


def leads(operator: Operator) -> bool:
    return "disttrain_operator_leader 1.0" in operator.answer("/metrics")[1]


def test_standby_takes_over_when_the_leader_is_killed(control_plane: ControlPlane) -> None:
    control_plane.kubectl("create", "namespace", "leader")
    rest = Rest(control_plane, "leader")
    flags = ("--namespaces=leader", "--leader-elect", "--lease-namespace=leader", "--progress=Pod")
    first, second = (Operator(control_plane, *flags, name=f"operator-leader-{number}") for number in (1, 2))
    with first, second:
        eventually(lambda: leads(first))
        assert second.answer("/readyz")[0] == 200
        assert not leads(second)
        rest.create(JOBS, job("led"))
        eventually(lambda: len(rest.list(PODS)) == len(pod_names("led")))
        assert second.requests() == {}
        first.kill()
        rest.delete(PODS, "led-worker-0", gracePeriodSeconds=0)
        eventually(lambda: leads(second), seconds=40)
        eventually(lambda: rest.find(PODS, "led-worker-0"))


def test_standby_that_is_asked_to_end_ends_at_once(control_plane: ControlPlane) -> None:
    control_plane.kubectl("create", "namespace", "standby")
    flags = ("--namespaces=standby", "--leader-elect", "--lease-namespace=standby", "--progress=Pod")
    first, second = (Operator(control_plane, *flags, name=f"operator-standby-{number}") for number in (1, 2))
    with first, second:
        eventually(lambda: leads(first))
        began = time.monotonic()
        assert second.stop() == 0
        assert time.monotonic() - began < PROMPT
        assert "Traceback" not in second.log
        assert leads(first)
