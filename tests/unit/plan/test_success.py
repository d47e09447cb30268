"""When a job is complete: by its successPolicy, by the word of its master, and what is said with it."""

from datetime import timedelta

import pytest

from disttrain.api import Progress, Termination
from disttrain.api.reasons import JobState
from disttrain.plan.model import Phase
from unit.plan.builders import MASTER, Scene, make_job


def test_complete_when_all_workers_succeeded_and_the_master_ended():
    scene = make_job().training().succeeded(0, ago=3)
    scene.seen()
    assert scene.status.state is JobState.TRAINING
    assert scene.status.worker.completed_indexes == "0"
    scene.succeeded(1).succeeded(0, role=MASTER)
    scene.step()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")
    assert scene.says("Failed") == ("False", "WorkersSucceeded")
    assert scene.condition("Complete").message == "2 of 2 workers succeeded"
    assert scene.status.completion_time == scene.now


def test_any_worker_completes_the_job_when_the_policy_says_so():
    scene = make_job().spec(successPolicy="AnyWorker").training().succeeded(1, ago=11)
    scene.step()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


def all_is_done(scene, *, ago=0):
    done = Progress(attempt=1, step=100, total_steps=100, world_size=1, finished=True)
    return scene.succeeded(0, role=MASTER, ago=ago, termination=Termination(progress=done))


def test_complete_when_the_master_says_so_though_a_lost_worker_was_not_back_in_time():
    """Its replacement would wait for a master that has ended."""
    scene = all_is_done(make_job().training().succeeded(0, ago=60).change(1, phase=Phase.PENDING, ready=False))
    scene.step()
    assert scene.says("Complete") == ("True", "TrainingDone")
    assert scene.condition("Complete").message == "All steps are done; 1 of 2 workers ended well"


def test_workers_that_still_run_when_the_master_has_ended_have_a_moment_to_end_well():
    """It depends on chance whose end is seen first."""
    scene = all_is_done(make_job().training())
    plan = scene.step()
    assert (plan.actions, plan.look_again <= timedelta(seconds=10)) == ((), True)
    scene.after(2).succeeded(0).step()
    assert scene.status.completion_time is None
    scene.after(2).succeeded(1).step()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")
    assert scene.status.replica_statuses[-1].succeeded == 2


def test_success_that_is_known_from_the_status_alone_does_not_end_a_job_before_a_live_look():
    """Another operator, or the process before this one, wrote it; the pods are as the cache has them, a moment behind, and the master is
    about to report."""
    scene = make_job().training().succeeded(0).succeeded(1)
    scene.seen()
    assert scene.status.worker.completed_indexes == "0-1"
    scene.change(0, phase=Phase.RUNNING, ready=True).change(1, phase=Phase.RUNNING, ready=True)
    assert scene.plan().irreversible
    scene.succeeded(0).succeeded(1).step()
    assert scene.status.completion_time is None
    scene.succeeded(0, role=MASTER).step()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


def test_a_worker_that_does_not_end_after_the_work_is_done_is_not_waited_for_longer_than_ten_seconds():
    scene = all_is_done(make_job().training().succeeded(0)).after(9.9)
    scene.step()
    assert scene.status.completion_time is None
    scene.after(0.1).step()
    assert scene.says("Complete") == ("True", "TrainingDone")


def test_what_fails_in_the_moment_after_the_work_is_done_is_neither_counted_nor_replaced():
    scene = all_is_done(make_job().workers(3).training()).after(1).failed(0, code=1).failed(1, code=75)
    plan = scene.step()
    assert (plan.actions, scene.status.restarts, scene.status.is_true("Failed")) == ((), None, False)
    scene.failed(2, code=134).step()
    assert scene.says("Complete") == ("True", "TrainingDone")


def test_work_that_is_done_is_not_undone_by_a_deadline_or_a_suspension_in_the_moment_after_it():
    scene = all_is_done(make_job().run_policy(activeDeadlineSeconds=100).training()).after(5)
    scene.spec(suspend=True, runPolicy={"activeDeadlineSeconds": 1}).step()
    assert scene.status.completion_time is None
    scene.after(5).step()
    assert scene.says("Complete") == ("True", "TrainingDone")


@pytest.mark.parametrize("ahead", [5, 3600])
def test_the_clock_of_a_node_does_not_decide_when_a_job_is_complete(ahead):
    for scene in (make_job().training().succeeded(0, 1, ago=-ahead), all_is_done(make_job().training(), ago=-ahead)):
        for _ in range(20):
            scene.after(1).step()
        assert scene.status.is_true("Complete")


def test_a_master_that_ended_without_a_last_word_completes_nothing():
    scene = make_job().training().succeeded(0, ago=60).succeeded(0, role=MASTER)
    scene.step()
    assert scene.says("Complete")[0] == "False"


def test_a_command_is_complete_with_its_workers_though_its_master_does_not_see_its_end():
    scene = make_job().command().training(100).succeeded(0, 1)
    scene.after(1).reports(100).step()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


def test_a_success_whose_workers_trained_apart_says_so():
    scene = make_job().command().training().succeeded(0, 1).after(1)
    scene.reports(100, warning="no process reported a world of more than 1")
    scene.step()
    warned = "2 of 2 workers succeeded. Warning: no process reported a world of more than 1"
    assert scene.condition("Complete").message == warned


def test_the_master_has_ten_seconds_to_end_after_the_workers():
    scene = make_job().training().succeeded(0, 1)
    assert scene.step().look_again == timedelta(seconds=10)
    assert scene.status.completion_time is None
    scene.after(9).step()
    assert scene.status.completion_time is None
    scene.after(1).step()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


def test_the_final_progress_comes_from_the_termination_message_of_the_master():
    scene = make_job().training(step=97)
    last = scene.reports(100, loss=0.25, finished=True, evaluation={"accuracy": 0.9712345}).report
    scene.reports(97)
    scene.succeeded(0, 1).succeeded(0, role=MASTER, termination=Termination(progress=last))
    scene.step()
    training = scene.status.training
    assert (training.step, training.progress_percent, training.eta_seconds, training.loss) == (100, 100, 0, 0.25)
    assert training.evaluation == {"accuracy": 0.97123}


def test_the_loss_of_a_job_that_is_done_is_that_of_its_end_however_early_its_last_step_was_read():
    scene = make_job().training(step=97).after(6).reports(100, loss=0.5).seen()
    assert scene.status.training.loss == 0.5  # of the newest reports
    last = scene.reports(100, loss=0.25, finished=True).report
    scene.succeeded(0, 1).succeeded(0, role=MASTER, termination=Termination(progress=last)).step()
    assert scene.status.training.loss == 0.25


def test_what_the_master_warns_of_is_said_also_of_a_job_whose_worker_was_lost_at_its_end():
    scene = make_job().training(step=100).reports(100, finished=True, warning="evaluation: loss is nan")
    scene.succeeded(0).failed(1, code=137).succeeded(0, role=MASTER, termination=Termination(progress=scene.report))
    events = [event for _ in range(3) for event in scene.after(11).step().events if event.warning]
    assert scene.says("Complete") == ("True", "TrainingDone")
    assert scene.condition("Complete").message.endswith("Warning: evaluation: loss is nan")
    assert [event.message.endswith("evaluation: loss is nan") for event in events] == [True]


def test_a_worker_that_crashes_after_the_master_said_that_all_is_done_fails_nothing() -> None:
    scene = make_job().run_policy(backoffLimit=0).training().after(5).reports(100, finished=True).seen()
    assert not scene.succeeded(0).failed(1, code=139).seen().status.is_true("Failed")


def test_a_master_that_is_evicted_after_its_termination_message_said_that_all_is_done_is_done() -> None:
    done = Termination(progress=Progress(attempt=1, step=100, finished=True))
    scene = make_job().training().after(5).gone(1).seen().succeeded(0)
    assert scene.failed(0, MASTER, code=0, reason="Evicted", termination=done).seen().status.is_true("Complete")


def test_a_succeeded_worker_is_remembered_when_its_pod_is_gone():
    scene = make_job().training().succeeded(0).seen().gone(0)
    assert scene.step().actions == ()
    scene.succeeded(1, ago=20).step()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


def test_without_a_word_of_the_worker_the_masters_account_decides() -> None:
    """Such as where its termination message could not be written."""
    scene = make_job().training(99).exited_early(0, 1).reports(100, finished=True).seen().after(11).seen()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


def test_without_a_word_of_the_operators_connection_the_worker_says_that_it_is_done() -> None:
    """The operator cannot reach the master."""
    scene = make_job().started().after(100).succeeded(0, 1).seen().after(11).seen()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


def test_a_worker_that_is_done_stays_done_whatever_its_exit_handlers_answer() -> None:
    scene = make_job().training(99).failed(0, code=3, termination=Termination(done=True)).succeeded(1)
    assert scene.seen().after(11).seen().says("Complete") == ("True", "WorkersSucceeded")


def test_a_command_that_exits_with_0_is_done() -> None:
    scene = make_job().command().started().exited_early(0, 1).after(1).reports(0, total=None).seen()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


def test_a_command_that_ends_before_its_master_was_asked_is_complete_with_the_last_report() -> None:
    """What was read before the end, or in the same second by the clock of its node, says nothing of how far it came."""
    scene = make_job().command().started().reports(0, total=None).seen().exited_early(0, 1)
    plan = scene.plan()
    assert (plan.asks, plan.look_again) == (True, timedelta(seconds=1))
    assert not scene.seen().finished
    assert not scene.after(0.9).reports(3, total=5).seen().finished
    assert scene.after(0.1).reports(5, total=5).seen().finished
    assert scene.status.training is not None
    assert scene.status.training.step == 5


def test_a_command_whose_master_does_not_answer_is_complete_after_ten_seconds() -> None:
    scene = make_job().command().started().exited_early(0, 1).seen()
    assert not scene.after(9).seen().finished
    assert scene.after(1).seen().finished


def script_that_ends_at(step: int) -> Scene:
    scene = make_job().script().training(5).succeeded(0, 1)
    last = Termination(progress=Progress(attempt=1, step=step, total_steps=100, finished=True))
    return scene.succeeded(0, role=MASTER, termination=last)


def test_a_script_that_ends_before_the_last_step_that_it_reports_is_complete_with_a_warning() -> None:
    scene = script_that_ends_at(9)
    events = [event for _ in range(3) for event in scene.step().events if event.warning]
    assert scene.says("Complete")[0] == "True"
    assert "step 9 of 100" in scene.condition("Complete").message
    assert [event.reason for event in events] == ["WorkersSucceeded"]


def test_a_script_that_reports_its_last_step_is_complete_without_a_warning() -> None:
    scene = script_that_ends_at(100)
    assert not [event for _ in range(3) for event in scene.step().events if event.warning]
    assert scene.condition("Complete").message == "2 of 2 workers succeeded"


def test_a_commands_last_report_is_waited_for_before_steps_are_called_missing() -> None:
    scene = make_job().command().started().reports(95).seen().after(3).exited_early(0, 1).seen()
    assert not scene.finished
    assert scene.after(1).reports(100).seen().condition("Complete").message == "2 of 2 workers succeeded"


def test_any_worker_that_succeeded_ends_the_job_also_when_it_is_beyond_the_number_of_today():
    elastic = {"replicas": 3, "elastic": {"minReplicas": 1, "maxReplicas": 3}}
    scene = make_job().script().spec(successPolicy="AnyWorker", worker=elastic).started()
    scene.succeeded(2).step()
    assert not scene.finished, "the master has a moment for its last report"
    scene.workers(1).after(20).step()
    assert scene.status.state == "Complete"
