"""Which plans must rest on a live look: those that nothing takes back, and no others."""

from __future__ import annotations

from datetime import timedelta

from disttrain.plan.view import REPORT_TIMEOUT
from unit.plan.builders import MASTER, make_job


def test_pass_in_which_nothing_happens_needs_no_look() -> None:
    assert not make_job().plan().irreversible
    assert not make_job().training().plan().irreversible


def test_replacement_of_a_failed_pod_needs_none() -> None:
    scene = make_job().training().failed(0)
    assert not scene.step().irreversible
    assert not scene.after(5).step().irreversible


def test_second_failure_needs_one_since_its_pod_may_be_gone_and_counted() -> None:
    scene = make_job().training().failed(0)
    scene.step()
    assert scene.after(1).failed(1, code=139).plan().irreversible


def test_success_needs_none() -> None:
    assert not make_job().training().succeeded(0, 1).succeeded(0, role=MASTER).plan().irreversible


def test_success_without_the_last_report_of_a_master_that_seems_to_run_needs_one() -> None:
    assert make_job().training().succeeded(0, 1, ago=11).plan().irreversible


def test_failure_by_a_deadline_needs_one() -> None:
    scene = make_job().run_policy(startupDeadlineSeconds=60)
    scene.step()
    assert scene.after(61).plan().irreversible


def test_failure_by_the_limit_of_retries_needs_one() -> None:
    assert make_job().run_policy(backoffLimit=0).training().failed(0).plan().irreversible


def test_failure_by_a_rule_needs_one() -> None:
    assert make_job().training().failed(0, code=1).plan().irreversible


def test_restart_of_the_job_needs_one() -> None:
    assert make_job().rules(default="RestartJob").training().failed(0).plan().irreversible


def test_pod_that_runs_and_is_given_up_needs_one() -> None:
    scene = make_job().training().after(5).reports(11).seen()
    scene.after(REPORT_TIMEOUT.total_seconds() + 1).failed(0, code=75).failed(1, code=75)
    plan = scene.plan()
    assert plan.status.restarts
    assert scene.pod(0, MASTER).uid in plan.status.restarts.accounted
    assert plan.irreversible


def test_deletion_by_force_needs_one_and_an_ordinary_one_does_not() -> None:
    scene = make_job().training()
    deadline = scene.now + timedelta(seconds=30)
    scene.change(0, deleting=True, deletion_deadline=deadline, disruption="DeletionByTaintManager")
    assert not scene.plan().irreversible
    plan = scene.after(600).plan()
    assert [action.grace_seconds for action in plan.actions if hasattr(action, "grace_seconds")] == [0]
    assert plan.irreversible


def test_deletion_of_the_job_by_its_ttl_needs_one() -> None:
    scene = make_job().run_policy(ttlSecondsAfterFinished=60).training().failed(0, code=1).seen()
    assert scene.finished
    assert not scene.plan().irreversible
    assert scene.after(61).plan().irreversible
