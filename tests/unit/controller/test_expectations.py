"""What was done is awaited until a watch tells of it, or asked for at its deadline."""

from __future__ import annotations

from typing import Any

from disttrain.controller.cache import Cache, Key
from disttrain.controller.expectations import EVENT_DEADLINE, Expectations
from disttrain.kube.api import SERVICES

JOB, CHILD = Key("default", "digits"), Key("default", "digits-child")
LATE = EVENT_DEADLINE.total_seconds()


def child(uid: str = "u1", version: int = 5, **metadata: Any) -> dict[str, Any]:
    named = {"name": CHILD.name, "namespace": CHILD.namespace, "uid": uid, "resourceVersion": str(version)}
    return {"metadata": {**named, **metadata}}


def overdue(awaited: Expectations, now: float) -> list[tuple[Key, str]]:
    return [(one.child, one.uid) for one in awaited.overdue(JOB, now)]


def test_creation_is_known_at_once_and_awaited_until_it_is_seen() -> None:
    awaited = Expectations(cache := Cache())
    awaited.created(JOB, SERVICES, child(), now=0)
    assert cache.stores[SERVICES].get(CHILD)
    assert overdue(awaited, LATE - 1) == []
    awaited.seen(JOB, "u1", gone=False)
    assert overdue(awaited, LATE + 1) == []
    assert awaited.next_deadline(JOB) is None


def test_creation_that_was_seen_before_its_answer_came_is_not_awaited() -> None:
    awaited = Expectations(cache := Cache())
    cache.stores[SERVICES].put(child(version=6))
    awaited.created(JOB, SERVICES, child(), now=0)
    assert awaited.next_deadline(JOB) is None


def test_deletion_is_not_met_by_a_pod_that_is_still_there() -> None:
    awaited = Expectations(Cache())
    awaited.deleted(JOB, SERVICES, child(deletionGracePeriodSeconds=30), now=0)
    awaited.there(JOB, SERVICES, child())
    assert overdue(awaited, LATE) == []
    assert overdue(awaited, LATE + 30) == [(CHILD, "u1")]


def test_overdue_child_is_asked_for_once_per_deadline() -> None:
    awaited = Expectations(Cache())
    awaited.created(JOB, SERVICES, child(), now=0)
    assert overdue(awaited, LATE) == [(CHILD, "u1")]
    assert overdue(awaited, LATE + 1) == []
    assert awaited.next_deadline(JOB) == 2 * LATE


def test_what_is_gone_is_neither_known_nor_awaited_any_more() -> None:
    awaited = Expectations(cache := Cache())
    awaited.created(JOB, SERVICES, child(), now=0)
    awaited.gone(JOB, SERVICES, CHILD, "u1")
    assert awaited.next_deadline(JOB) is None
    assert cache.stores[SERVICES].get(CHILD) is None
    assert cache.stores[SERVICES].put(child(version=7)) is None
