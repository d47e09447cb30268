"""A process that was restarted in its pod counts as a pod that was replaced: once, however often it is reported and by which process."""

from datetime import datetime, timedelta
from typing import Any

import pytest

from disttrain.api import Termination
from disttrain.api.runtime import ProgressCheckpoint, RestartsInPlace
from disttrain.api.status import Restarts
from unit.plan.builders import NOON, SERVER, WORKER, Scene, make_job


def said(
    uid: str,
    restarts: int = 1,
    failures: int | None = None,
    *,
    code: int = 137,
    how: str = "killed by SIGKILL at step 7",
    at: datetime = NOON,
) -> RestartsInPlace:
    failed = restarts if failures is None else failures
    return RestartsInPlace(pod=uid, restarts=restarts, failures=failed, exit_code=code, message=how, time=at)


def reported(job: Scene, *entries: RestartsInPlace, step: int = 10, **fields: Any) -> Scene:
    return job.reports(step, restarts_in_place=entries, **fields)


def account(job: Scene) -> Restarts:
    assert job.status.restarts is not None
    return job.status.restarts


def test_a_restart_in_place_stands_in_the_status_with_its_role_index_and_code() -> None:
    job = make_job().training()
    plan = reported(job, said(job.pod(1).uid)).step()
    assert (account(job).total, account(job).counted_towards_limit) == (1, 1)
    last = account(job).last
    assert last is not None
    assert (last.role, last.index, last.exit_code, last.reason) == ("Worker", 1, 137, "Error")
    assert {status.role: status.restarts for status in job.status.replica_statuses} == {"Master": 0, "Worker": 1}
    (event,) = [event for event in plan.events if event.reason == "RestartedInPlace"]
    assert event.message == (
        "The process of pod digits-worker-1 ended with exit code 137: killed by SIGKILL at step 7; it was started again in the pod"
    )
    assert plan.actions == ()
    assert job.says("Progressing") == ("True", "Training")


def test_an_event_says_how_the_process_ended_this_time() -> None:
    job = make_job().training()
    uid = job.pod(1).uid
    messages = []
    for restarts, failures in ((1, 1), (2, 1), (4, 3)):
        plan = reported(job, said(uid, restarts, failures, code=134, how="ended with exit code 134 at step 9")).step()
        messages += [event.message for event in plan.events if event.reason == "RestartedInPlace"]
    begin, end = "The process of pod digits-worker-1 ", "; it was started again in the pod"
    assert [message.removeprefix(begin).removesuffix(end) for message in messages] == [
        "ended with exit code 134 at step 9",
        "lost its peers",
        "ended 2 times, the last time with exit code 134 at step 9",
    ]


def test_it_is_counted_once_over_passes_and_over_a_restart_of_the_operator() -> None:
    job = make_job().training()
    entry = said(job.pod(1).uid)
    reported(job, entry).seen()
    job.after(5)
    assert not [event for event in reported(job, entry, step=20).step().events if event.reason == "RestartedInPlace"]
    job.new_operator().seen()
    reported(job, entry, step=30).seen()
    assert account(job).total == 1


def test_a_pass_whose_status_was_not_written_counts_nothing_twice() -> None:
    job = make_job().training()
    before = job.status
    reported(job, said(job.pod(1).uid)).step()
    job.status = before
    job.step()
    assert account(job).total == 1


def test_a_master_that_was_replaced_and_knows_less_takes_nothing_back() -> None:
    job = make_job().training()
    uid = job.pod(1).uid
    reported(job, said(uid, 2)).seen()
    reported(job).seen()
    reported(job, said(uid, 1)).seen()
    reported(job, said(uid, 3)).seen()
    assert account(job).total == 3


def test_a_pod_says_at_its_end_what_no_report_said() -> None:
    job = make_job().training()
    uid = job.pod(1).uid
    reported(job, said(uid, 1)).seen()
    ended = Termination(message="killed by SIGKILL at step 7", restarts_in_place=said(uid, 2))
    job.failed(1, code=137, reason="Error", termination=ended).seen()
    assert (account(job).total, account(job).counted_towards_limit) == (3, 3)  # two in place, and the pod itself
    job.after(60).seen()
    assert account(job).in_place == (), "it is kept for as long as the pod is there"
    assert job.pod(1).uid != uid


def test_the_successor_of_a_pod_begins_to_count_at_0() -> None:
    job = make_job().training()
    reported(job, said(job.pod(1).uid, 2)).seen()
    job.failed(1).seen()
    job.after(60).seen().all_run().seen()
    reported(job, said(job.pod(1).uid, 1), step=50).seen()
    assert account(job).total == 4


def test_a_process_that_lost_its_peers_is_a_restart_and_no_failure() -> None:
    job = make_job().training()
    lost = said(job.pod(0).uid, 2, 0, code=75)
    plan = reported(job, lost).step()
    assert (account(job).total, account(job).counted_towards_limit) == (2, 0)
    assert not any(event.warning for event in plan.events)
    killed = said(job.pod(1).uid, 1, at=NOON - timedelta(seconds=1))
    reported(job, lost, killed).step()
    last = account(job).last
    assert last is not None
    assert (last.index, last.exit_code) == (1, 137)


def test_pods_that_fail_at_once_count_once_towards_the_limit_and_each_in_the_total() -> None:
    job = make_job().workers(4).training()
    reported(job, *(said(job.pod(index).uid) for index in range(4))).step()
    assert (account(job).total, account(job).counted_towards_limit) == (4, 1)


@pytest.mark.parametrize(("restarts", "fails"), [(2, False), (3, True)])
def test_the_backoff_limit_holds_for_restarts_in_place(restarts: int, fails: bool) -> None:
    job = make_job().run_policy(backoffLimit=2).training()
    for number in range(1, restarts + 1):
        reported(job.after(1), said(job.pod(1).uid, number)).seen()
    assert job.finished is fails
    if fails:
        assert job.says("Failed") == ("True", "BackoffLimitExceeded")
        assert "More than 2 failures (runPolicy.backoffLimit). The last: The process of pod digits-worker-1" in (
            job.condition("Failed").message
        )


def test_a_checkpoint_sets_them_back_too() -> None:
    job = make_job().run_policy(backoffLimit=2).training()
    for number in range(1, 6):
        checkpoint = ProgressCheckpoint(step=10 * number, time=job.now)
        reported(job.after(1), said(job.pod(1).uid, number), step=10 * number, last_checkpoint=checkpoint).seen()
    assert not job.finished
    assert (account(job).total, account(job).counted_towards_limit) == (5, 1)


def test_a_job_that_ends_before_the_next_report_counts_what_the_last_words_say() -> None:
    job = make_job().workers(1).training()
    job.succeeded(0, termination=Termination(restarts_in_place=said(job.pod(0).uid)))
    job.after(30).seen()
    assert job.says("Complete")[0] == "True"
    assert (account(job).total, account(job).in_place) == (1, ())


def test_a_server_counts_for_its_role() -> None:
    job = make_job().servers(2).training()
    reported(job, said(job.pod(1, SERVER).uid)).step()
    restarts = {status.role: status.restarts for status in job.status.replica_statuses}
    assert restarts == {"Master": 0, "ParameterServer": 1, "Worker": 0}


def test_a_clock_that_is_ahead_does_not_reach_the_status() -> None:
    job = make_job().training()
    reported(job, said(job.pod(0, WORKER).uid, at=NOON + timedelta(hours=1))).step()
    assert account(job).last is not None
    assert account(job).last.time <= job.now  # type: ignore[union-attr]


def test_a_failed_pod_that_waits_stays_the_cause_of_what_follows() -> None:
    job = make_job().workers(3).training()
    job.failed(0, code=137, reason="OOMKilled").step()
    reported(job, said(job.pod(1).uid)).step()
    last = account(job).last
    assert last is not None
    assert (last.index, last.reason) == (0, "OOMKilled")
    assert account(job).total == 2


def test_a_pod_that_is_no_more_counts_nothing() -> None:
    job = make_job().training()
    reported(job, said("a-pod-that-was-deleted", 3)).step()
    assert job.status.restarts is None
