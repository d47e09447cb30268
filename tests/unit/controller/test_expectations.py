"""What was done is awaited until a watch tells of it, or asked for at its deadline."""

from __future__ import annotations

from disttrain.controller.api import PODS
from disttrain.controller.cache import Key
from disttrain.controller.expectations import DEADLINE, Expectations

JOB, POD = Key("default", "digits"), Key("default", "digits-worker-0")
LATE = DEADLINE.total_seconds()


def test_creation_is_awaited_until_it_is_seen() -> None:
    awaited = Expectations()
    awaited.created(JOB, PODS, POD, "u1", now=0)
    assert awaited.overdue(JOB, now=LATE - 1) == []
    awaited.seen(JOB, "u1", gone=False)
    assert awaited.overdue(JOB, now=LATE + 1) == []
    assert awaited.next_deadline(JOB) is None


def test_deletion_is_not_met_by_a_pod_that_is_still_there() -> None:
    awaited = Expectations()
    awaited.deleted(JOB, PODS, POD, "u1", now=0, grace=30)
    awaited.seen(JOB, "u1", gone=False)
    assert awaited.overdue(JOB, now=LATE) == []
    assert awaited.overdue(JOB, now=LATE + 30) == [(PODS, POD)]


def test_overdue_child_is_asked_for_once_per_deadline() -> None:
    awaited = Expectations()
    awaited.created(JOB, PODS, POD, "u1", now=0)
    assert awaited.overdue(JOB, now=LATE) == [(PODS, POD)]
    assert awaited.overdue(JOB, now=LATE + 1) == []
    assert awaited.next_deadline(JOB) == 2 * LATE


def test_deletion_seen_meets_a_creation_too() -> None:
    awaited = Expectations()
    awaited.created(JOB, PODS, POD, "u1", now=0)
    awaited.seen(JOB, "u1", gone=True)
    assert awaited.next_deadline(JOB) is None
