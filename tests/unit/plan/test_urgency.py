"""How urgent a write is: what the next step depends on, what a user has to act on, and what can go along with a later change."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.api.status import DistTrainJobStatus
from disttrain.plan.model import Write
from disttrain.plan.urgency import urgency

NOON = "2026-01-01T12:00:00Z"


def condition(type_: str, status: str, message: str = "", reason: str = "X") -> dict[str, str]:
    return {
        "type": type_,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2026-01-01T12:00:00Z",
    }


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
            Write.BEGINNING,
            id="beginning",
        ),
        pytest.param(
            {},
            {
                "startTime": "2026-01-01T12:00:00Z",
                "attempt": 1,
                "conditions": [condition("Valid", "True"), condition("Scheduled", "False", reason="Unschedulable")],
            },
            Write.NOW,
            id="a start with an unschedulable pod",
        ),
        pytest.param(
            {},
            {"startTime": "2026-01-01T12:00:00Z", "attempt": 1, "restarts": {"total": 1}},
            Write.NOW,
            id="beginning with a failure",
        ),
        pytest.param(
            {"conditions": [condition("Suspended", "True")]},
            {"startTime": "2026-01-01T12:00:00Z", "attempt": 1, "conditions": [condition("Suspended", "False")]},
            Write.NOW,
            id="beginning after a suspension, in which it could be edited",
        ),
        pytest.param({}, {"conditions": [condition("Valid", "False")]}, Write.NOW, id="mistake"),
        pytest.param({"attempt": 1}, {"attempt": 2}, Write.NOW, id="attempt"),
        pytest.param(
            {"restarts": {"total": 1}},
            {"restarts": {"total": 2}},
            Write.NOW,
            id="failure written down before its pod is deleted",
        ),
        pytest.param({}, {"conditions": [condition("Failed", "True")]}, Write.NOW, id="end"),
        pytest.param({}, {"conditions": [condition("Ready", "True")]}, Write.SOON, id="stage of a start"),
        pytest.param(
            {"conditions": [condition("Restarting", "False")]},
            {"conditions": [condition("Restarting", "True", reason="Replaced")]},
            Write.NOW,
            id="pod that is replaced, of which the next pass sees nothing",
        ),
        pytest.param(
            {"conditions": [condition("Progressing", "True", reason="Training")]},
            {"conditions": [condition("Progressing", "False", reason="Stalled")]},
            Write.NOW,
            id="no step for long",
        ),
        pytest.param(
            {"worker": {"readyReplicas": 2}},
            {"worker": {"readyReplicas": 1, "completedIndexes": "0"}},
            Write.NOW,
            id="success of a worker, whose pod may be gone at the next pass",
        ),
        pytest.param({"state": "Starting"}, {"state": "Training"}, Write.SOON, id="state"),
        pytest.param({"training": {"step": 1}}, {"training": {"step": 2}}, Write.PROGRESS, id="progress"),
        pytest.param({}, {"health": [{"name": "a", "since": NOON, "step": 5}]}, Write.PROGRESS, id="a breach begins"),
        pytest.param({"health": [{"name": "a", "since": NOON, "step": 5}]}, {}, Write.SOON, id="a stored breach ends"),
        pytest.param(
            {"health": [{"name": "a", "since": NOON}]},
            {"health": [{"name": "a", "since": NOON, "done": True}]},
            Write.SOON,
            id="a rule acts",
        ),
        pytest.param(
            {"health": [{"name": "a", "rollBacks": 1}]},
            {"health": [{"name": "a", "rollBacks": 1, "since": NOON, "step": 5}]},
            Write.PROGRESS,
            id="another breach after a roll-back begins",
        ),
        pytest.param(
            {"replicaStatuses": []}, {"replicaStatuses": [{"role": "Worker", "ready": 1}]}, Write.WITH_NEXT, id="count"
        ),
        pytest.param(
            {"conditions": [condition("Ready", "False", "a")]},
            {"conditions": [condition("Ready", "False", "b")], "worker": {"readyReplicas": 1}},
            Write.WITH_NEXT,
            id="another message of the same condition, and a count",
        ),
        pytest.param(
            {"conditions": [condition("Scheduled", "False")]},
            {"conditions": [condition("Scheduled", "False", reason="Unschedulable")]},
            Write.NOW,
            id="a problem that does not pass by itself",
        ),
        pytest.param(
            {"conditions": [condition("Ready", "True")]},
            {"conditions": [condition("Ready", "False", reason="Starting")]},
            Write.SOON,
            id="wait that passes by itself",
        ),
    ],
)
def test_change_waits_where_that_loses_nothing(old: dict[str, Any], new: dict[str, Any], expected: Write) -> None:
    before, after = map(DistTrainJobStatus.model_validate, (old, new))
    assert urgency(before, after) is expected
