"""What news makes of the cache and of the queue."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disttrain.api.names import API_VERSION, KIND
from disttrain.controller.cache import Cache, Key
from disttrain.controller.expectations import Expectations
from disttrain.controller.intake import POD_CHANGES_TOGETHER_SECONDS, Intake
from disttrain.controller.queue import WorkQueue
from disttrain.controller.record import Child, JobRecords
from disttrain.controller.resync import WatchHealth
from disttrain.kube.api import PODS
from unit.controller.hand_turned import hand_turned, now

JOB = Key("default", "digits")


def pod(uid: str, version: int, phase: str = "Failed", **status: Any) -> dict[str, Any]:
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": "digits", "uid": "job", "controller": True}
    labels = {
        "disttrain.dev/job-name": "digits",
        "disttrain.dev/role": "worker",
        "disttrain.dev/index": "0",
        "disttrain.dev/attempt": "1",
    }
    metadata = {
        "name": "digits-worker-0",
        "namespace": "default",
        "uid": uid,
        "resourceVersion": str(version),
        "labels": labels,
    }
    return {
        "metadata": {**metadata, "creationTimestamp": "2026-01-01T00:00:00Z", "ownerReferences": [owner]},
        "spec": {},
        "status": {"phase": phase, **status},
    }


class Parts:
    def __init__(self) -> None:
        self.cache, self.queue = Cache(), WorkQueue[Key]()
        self.expectations = Expectations(self.cache)
        self.records = JobRecords()
        watch_health = WatchHealth(asyncio.get_running_loop().time)
        self.intake = Intake(self.cache, self.queue, self.expectations, self.records, watch_health)

    def tell(self, type_: str | None, body: dict[str, Any]) -> None:
        self.intake.take(PODS, {"type": type_, "object": body})


async def test_our_own_echo_queues_nothing() -> None:
    parts = Parts()
    parts.cache.pods.put(pod("u1", 5))
    parts.tell("ADDED", pod("u1", 5))
    assert len(parts.queue) == 0


async def test_failed_pod_is_looked_at_at_once() -> None:
    parts = Parts()
    parts.tell("MODIFIED", pod("u1", 5))
    assert await parts.queue.get() == JOB


async def test_pod_that_cannot_be_placed_is_looked_at_at_once() -> None:
    parts = Parts()
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    parts.tell("MODIFIED", pod("u1", 5, "Pending", conditions=[unschedulable]))
    assert await parts.queue.get() == JOB


@pytest.mark.parametrize(
    ("wait", "seconds"),
    [
        pytest.param(-5.0, POD_CHANGES_TOGETHER_SECONDS, id="nothing waits"),
        pytest.param(3.0, 3.0, id="a small write waits"),
    ],
)
@hand_turned
async def test_pod_that_runs_is_looked_at_when_its_status_can_be_written(wait: float, seconds: float) -> None:
    parts, began = Parts(), now()
    parts.records.of(JOB, "job").small_writes_wait(began + wait)
    parts.tell("MODIFIED", pod("u1", 5, "Running"))
    assert await parts.queue.get() == JOB
    assert now() - began == pytest.approx(seconds, abs=0.1)


async def test_late_deletion_of_the_former_pod_does_not_answer_for_its_successor() -> None:
    parts = Parts()
    parts.expectations.created(JOB, PODS, pod("u2", 9), now=0)
    parts.tell("DELETED", pod("u1", 8))
    assert parts.expectations.next_deadline(JOB) is not None
    assert len(parts.queue) == 0


async def test_name_that_comes_free_stops_nothing_any_more() -> None:
    parts = Parts()
    record, child = parts.records.of(JOB, "job"), Child(PODS, Key("default", "digits-worker-0"))
    record.name_conflicts[child] = 0.0
    parts.tell("DELETED", pod("u1", 8))
    assert record.name_conflicts == {}


@pytest.mark.parametrize(("seconds", "queued"), [(60.0, [7]), (120.0, [7, 0]), (float("inf"), [7, *range(7), 8, 9])])
async def test_a_comparison_queues_the_jobs_that_waited_longest_for_a_pass(seconds: float, queued: list[int]) -> None:
    """As many of ten as come to their turn. Of another controller's jobs there are no passes."""
    parts = Parts()
    for number in range(12):
        metadata = {"name": f"job-{number}", "namespace": "default", "uid": f"{number}", "resourceVersion": "1"}
        managed = {"managedBy": "example.org/another"} if number >= 10 else {}
        parts.cache.jobs.put({"metadata": metadata, "spec": managed})
        if number not in (7, 10, 11):
            parts.records.of(Key("default", f"job-{number}"), f"{number}").looked_at = float(number)
    parts.intake.compared(seconds)
    found = [await parts.queue.get() for _ in range(len(parts.queue))]
    assert found == [Key("default", f"job-{number}") for number in queued]
