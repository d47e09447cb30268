"""What becomes of two states of a job in the operator's own metrics."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from disttrain.api.names import Role
from disttrain.api.status import DistTrainJobStatus
from disttrain.controller.metrics import REGISTRY, observe

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def at(seconds: float) -> str:
    return (NOON + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(type_: str, status: str, reason: str, since: float) -> dict[str, Any]:
    return {"type": type_, "status": status, "reason": reason, "lastTransitionTime": at(since)}


def status(*conditions: dict[str, Any], **fields: Any) -> DistTrainJobStatus:
    """Of a job that started at noon."""
    return DistTrainJobStatus.model_validate(
        {"startTime": at(0), "attempt": 1, "conditions": list(conditions), **fields}
    )


def failure(time: float, role: str = "Worker") -> dict[str, Any]:
    return {"total": 1, "last": {"role": role, "index": 0, "reason": "OOMKilled", "time": at(time)}}


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Observed:
    """What one observation adds."""

    def __init__(self, old: DistTrainJobStatus, new: DistTrainJobStatus, *, at: float) -> None:
        names = [
            *(
                (f"disttrain_operator_startup_seconds_{kind}", {"phase": p})
                for kind in ("count", "sum")
                for p in PHASES
            ),
            *((f"disttrain_operator_recovery_seconds_{kind}", {"role": r}) for kind in ("count", "sum") for r in ROLES),
            *(("disttrain_operator_restarts_total", {"role": r, "reason": "OOMKilled"}) for r in ROLES),
        ]
        before = [value(name, **labels) for name, labels in names]
        observe(old, new, NOON + timedelta(seconds=at))
        self._more = {
            # Rounded: the sums hold what other tests observed as well, and a difference of two of them is not exact.
            (name.removeprefix("disttrain_operator_"), next(iter(labels.values()))): round(
                value(name, **labels) - was, 6
            )
            for (name, labels), was in zip(names, before, strict=True)
        }

    def seconds(self, metric: str, label: str) -> float | None:
        return self._more[f"{metric}_seconds_sum", label] if self._more[f"{metric}_seconds_count", label] else None

    def starts(self) -> dict[str, float]:
        return {phase: seconds for phase in PHASES if (seconds := self.seconds("startup", phase)) is not None}

    def recoveries(self) -> dict[str, float]:
        return {role: seconds for role in ROLES if (seconds := self.seconds("recovery", role)) is not None}

    def restarts(self) -> dict[str, float]:
        return {role: more for role in ROLES if (more := self._more["restarts_total", role])}


PHASES = ("schedule", "ready", "train")
ROLES = (*Role, "job")
"""As in the trainers' metrics: not the words of the status."""
HOURS = 3 * 3600


def test_first_start_is_measured_stage_by_stage() -> None:
    waiting = status(condition("Scheduled", "False", "Scheduling", 0), condition("Ready", "False", "Starting", 0))
    placed = status(condition("Scheduled", "True", "AllPodsScheduled", 20), condition("Ready", "False", "Starting", 0))
    ready = status(
        condition("Scheduled", "True", "AllPodsScheduled", 20), condition("Ready", "True", "AllPodsReady", 25)
    )
    assert Observed(waiting, placed, at=20).starts() == {"schedule": 20}
    assert Observed(placed, ready, at=25).starts() == {"ready": 5}


@pytest.mark.parametrize("silent", [False, True])
def test_first_step_is_measured_also_when_the_master_did_not_answer_at_first(*, silent: bool) -> None:
    ready = condition("Ready", "True", "AllPodsReady", 25)
    before = condition("Progressing", "Unknown" if silent else "False", "NoReport", 60 if silent else 0)
    after = status(
        ready, condition("Progressing", "True", "Training", 90), training={"step": 1, "lastUpdateTime": at(90)}
    )
    assert Observed(status(ready, before), after, at=90).starts() == {"train": 65}


def test_pod_that_is_deleted_hours_later_is_no_start() -> None:
    restarting = condition("Restarting", "True", "Replaced", HOURS)
    old = status(condition("Scheduled", "False", "Scheduling", HOURS), restarting)
    new = status(condition("Scheduled", "True", "AllPodsScheduled", HOURS + 18), restarting)
    assert Observed(old, new, at=HOURS + 18).starts() == {}
    # Also when one write has everything.
    recovered = condition("Restarting", "False", "Recovered", HOURS + 18)
    new = status(condition("Scheduled", "True", "AllPodsScheduled", HOURS + 18), recovered)
    assert Observed(old, new, at=HOURS + 18).starts() == {}


def test_training_that_reports_again_after_hours_is_no_start() -> None:
    ready = condition("Ready", "True", "AllPodsReady", 25)
    training = {"step": 70, "lastUpdateTime": at(HOURS)}
    old = status(ready, condition("Progressing", "Unknown", "NoReport", HOURS + 60), training=training)
    new = status(ready, condition("Progressing", "True", "Training", HOURS + 90), training=training)
    assert Observed(old, new, at=HOURS + 90).starts() == {}


def test_recovery_counts_from_the_failure() -> None:
    old = status(condition("Restarting", "True", "ReplicaFailed", 1010), restarts=failure(1010))
    new = status(condition("Restarting", "False", "Recovered", 1040), restarts=failure(1010))
    assert Observed(old, new, at=1040).recoveries() == {"worker": 30}


@pytest.mark.parametrize("role", Role)
def test_roles_have_the_words_of_the_trainers_metrics(role: Role) -> None:
    """So that the two can be joined: there the label is that of the pod, disttrain.dev/role."""
    name = role.status_name
    failed = failure(1010, role=name)
    old = status(condition("Restarting", "True", "ReplicaFailed", 1010), restarts=failed)
    counts = [{"role": name, "restarts": 1}]
    new = status(condition("Restarting", "False", "Recovered", 1040), restarts=failed, replicaStatuses=counts)
    seen = Observed(old, new, at=1040)
    assert seen.recoveries() == {role: 30}
    assert seen.restarts() == {role: 1}


def test_stall_that_is_no_pods_counts_as_the_jobs() -> None:
    failed = failure(1010, role="Job")
    before = status(
        condition("Restarting", "True", "Stalled", 1010), replicaStatuses=[{"role": "Worker", "restarts": 1}]
    )
    after = status(
        condition("Restarting", "False", "Recovered", 1040),
        restarts=failed,
        replicaStatuses=[{"role": "Worker", "restarts": 1}],
    )
    seen = Observed(before, after, at=1040)
    assert (seen.restarts(), seen.recoveries()) == ({"job": 1}, {"job": 30})


def test_preemption_long_after_a_failure_counts_from_the_preemption() -> None:
    old = status(condition("Restarting", "True", "Preempted", HOURS), restarts=failure(100))
    new = status(condition("Restarting", "False", "Recovered", HOURS + 12), restarts=failure(100))
    assert Observed(old, new, at=HOURS + 12).recoveries() == {"worker": 12}


@pytest.mark.parametrize(
    ("message", "role"),
    [
        ("Pod j-worker-1-ps-0 was deleted because its node is lost; the operator creates it again", "parameter-server"),
        (
            "Node n of pod j-master-0 does not report since 12:00:00 UTC; the operator creates the pod again when …",
            "master",
        ),
        ("Pod j-worker-12 was evicted from its node; the operator creates it again", "worker"),
    ],
)
@pytest.mark.parametrize("failed_before", [True, False])
def test_recovery_from_a_lost_node_counts_for_the_pod_that_was_lost(
    message: str, role: str, *, failed_before: bool
) -> None:
    failures = {"restarts": failure(100)} if failed_before else {}
    old = status({**condition("Restarting", "True", "NodeLost", HOURS), "message": message}, **failures)
    new = status(condition("Restarting", "False", "Recovered", HOURS + 12), **failures)
    assert Observed(old, new, at=HOURS + 12).recoveries() == {role: 12}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("ReplicaFailed", "BackoffLimitExceeded", id="job that failed"),
        pytest.param("ReplicaFailed", "Suspended", id="job that was suspended"),
        pytest.param("Replaced", "Recovered", id="pod that another client deleted"),
    ],
)
def test_nothing_recovered_from_a_failure_here(before: str, after: str) -> None:
    old = status(condition("Restarting", "True", before, HOURS), restarts=failure(100))
    new = status(condition("Restarting", "False", after, HOURS + 12), restarts=failure(100))
    assert Observed(old, new, at=HOURS + 12).recoveries() == {}


def test_restarts_are_counted_by_the_roles_that_were_replaced() -> None:
    def counts(master: int, workers: int) -> list[dict[str, Any]]:
        return [{"role": "Master", "restarts": master}, {"role": "Worker", "restarts": workers}]

    old = status(replicaStatuses=counts(1, 4), restarts=failure(10))
    new = status(replicaStatuses=counts(2, 7), restarts=failure(20, role="Master"))
    assert Observed(old, new, at=20).restarts() == {"master": 1, "worker": 3}
    assert Observed(new, new, at=20).restarts() == {}
