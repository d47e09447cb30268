"""What of a status is sent, and when it may wait."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.controller.status import merge_patch, resting, rests

JSON = st.recursive(
    st.integers() | st.text(max_size=3) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=2), JSON, max_size=4)


def applied(target: Any, patch: Any) -> Any:
    """RFC 7386, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = applied(result.get(key), value)
    return result


@given(OBJECTS, OBJECTS)
def test_patch_makes_the_new_of_the_old(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert applied(old, merge_patch(old, new)) == new


@given(OBJECTS)
def test_equal_objects_need_no_patch(same: dict[str, Any]) -> None:
    assert merge_patch(same, same) == {}


def condition(type_: str, status: str, message: str = "", reason: str = "X") -> dict[str, str]:
    return {"type": type_, "status": status, "reason": reason, "message": message}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(
            {},
            {
                "startTime": "2026-01-01T12:00:00Z",
                "attempt": 1,
                "state": "Scheduling",
                "conditions": [
                    condition("Valid", "True"),
                    condition("Suspended", "False"),
                    condition("Scheduled", "False", reason="Scheduling"),
                    condition("Complete", "False"),
                    condition("Failed", "False"),
                ],
            },
            0,
            id="beginning",
        ),
        pytest.param(
            {},
            {
                "startTime": "2026-01-01T12:00:00Z",
                "attempt": 1,
                "conditions": [condition("Valid", "True"), condition("Scheduled", "False", reason="Unschedulable")],
            },
            None,
            id="beginning with an obstacle",
        ),
        pytest.param(
            {},
            {"startTime": "2026-01-01T12:00:00Z", "attempt": 1, "restarts": {"total": 1}},
            None,
            id="beginning with a failure",
        ),
        pytest.param(
            {"conditions": [condition("Suspended", "True")]},
            {"startTime": "2026-01-01T12:00:00Z", "attempt": 1, "conditions": [condition("Suspended", "False")]},
            None,
            id="beginning after a suspension, in which it could be edited",
        ),
        pytest.param({}, {"conditions": [condition("Valid", "False")]}, None, id="mistake"),
        pytest.param({"attempt": 1}, {"attempt": 2}, None, id="attempt"),
        pytest.param(
            {"restarts": {"total": 1}},
            {"restarts": {"total": 2}},
            None,
            id="failure written down before its pod is deleted",
        ),
        pytest.param({}, {"conditions": [condition("Failed", "True")]}, None, id="end"),
        pytest.param({}, {"conditions": [condition("Ready", "True")]}, 1, id="stage of a start"),
        pytest.param(
            {"conditions": [condition("Restarting", "False")]},
            {"conditions": [condition("Restarting", "True", reason="Replaced")]},
            None,
            id="pod that is replaced, of which the next pass sees nothing",
        ),
        pytest.param(
            {"conditions": [condition("Progressing", "True", reason="Training")]},
            {"conditions": [condition("Progressing", "False", reason="Stalled")]},
            None,
            id="no step for long",
        ),
        pytest.param(
            {"worker": {"readyReplicas": 2}},
            {"worker": {"readyReplicas": 1, "completedIndexes": "0"}},
            None,
            id="success of a worker, whose pod may be gone at the next pass",
        ),
        pytest.param({"state": "Starting"}, {"state": "Training"}, 1, id="state"),
        pytest.param({"training": {"step": 1}}, {"training": {"step": 2}}, 1, id="progress"),
        pytest.param({"replicaStatuses": []}, {"replicaStatuses": [{"ready": 1}]}, 3, id="count"),
        pytest.param(
            {"conditions": [condition("Ready", "False", "a")]},
            {"conditions": [condition("Ready", "False", "b")], "worker": {"readyReplicas": 1}},
            3,
            id="other words for the same, and a count",
        ),
        pytest.param(
            {"conditions": [condition("Scheduled", "False")]},
            {"conditions": [condition("Scheduled", "False", reason="Unschedulable")]},
            None,
            id="obstacle that does not pass by itself",
        ),
        pytest.param(
            {"conditions": [condition("Ready", "True")]},
            {"conditions": [condition("Ready", "False", reason="Starting")]},
            1,
            id="wait that passes by itself",
        ),
    ],
)
def test_change_rests_as_long_as_nobody_misses_it(
    old: dict[str, Any], new: dict[str, Any], expected: int | None
) -> None:
    assert rests(old, new, merge_patch(old, new)) == expected


@pytest.mark.parametrize(
    ("number", "latency", "seconds"),
    [
        pytest.param(None, 9.0, 0.0, id="what is urgent never waits"),
        pytest.param(0, 0.005, 0.15, id="a beginning"),
        pytest.param(0, 0.1, 3.0, id="a beginning among many"),
        pytest.param(1, 0.01, 2.0, id="the setting as it is"),
        pytest.param(1, 0.1, 3.0, id="requests that take long"),
        pytest.param(1, 9.0, 6.0, id="not without an end"),
        pytest.param(3, 0.0, 6.0, id="a small change"),
    ],
)
def test_slow_requests_make_rests_longer(number: int | None, latency: float, seconds: float) -> None:
    assert resting(2.0, number, latency=latency) == pytest.approx(seconds)
