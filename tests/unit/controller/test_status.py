"""What of a status is sent, and when it may wait."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.controller.status import _urgent, merge_patch

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


def condition(type_: str, status: str, message: str = "") -> dict[str, str]:
    return {"type": type_, "status": status, "reason": "X", "message": message}


@pytest.mark.parametrize(
    ("old", "new", "urgent"),
    [
        pytest.param({}, {"attempt": 1}, True, id="first write"),
        pytest.param(
            {"restarts": {"total": 1}},
            {"restarts": {"total": 2}},
            True,
            id="failure written down before its pod is deleted",
        ),
        pytest.param({}, {"conditions": [condition("Failed", "True")]}, True, id="end"),
        pytest.param({}, {"conditions": [condition("Ready", "True")]}, False, id="stage of a start"),
        pytest.param({"replicaStatuses": []}, {"replicaStatuses": [{"ready": 1}]}, False, id="count"),
        pytest.param(
            {"conditions": [condition("Valid", "True", "a")]},
            {"conditions": [condition("Valid", "True", "b")]},
            False,
            id="other words for the same",
        ),
    ],
)
def test_urgency(old: dict[str, Any], new: dict[str, Any], *, urgent: bool) -> None:
    assert _urgent(old, new, merge_patch(old, new)) is urgent
