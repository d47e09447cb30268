"""A job that meets no trouble: made, started, trained, complete, cleaned up."""

from datetime import timedelta

import pytest

from disttrain.api import Progress, Termination
from disttrain.api.names import ChildKind
from disttrain.api.reasons import JobState, Reason
from disttrain.plan import decide
from disttrain.plan.model import Create, CreatePod, Delete, DeleteJob, Phase
from unit.plan.builders import MASTER, NOON, SERVER, WORKER, created, deleted, make_job


def test_everything_is_made_in_one_pass_master_first():
    plan = make_job().servers(2).workers(3).step()
    assert plan.actions[:2] == (Create(kind=ChildKind.SERVICE), Create(kind=ChildKind.NETWORK_POLICY))
    assert created(plan) == [(MASTER, 0), (SERVER, 0), (SERVER, 1), (WORKER, 0), (WORKER, 1), (WORKER, 2)]
    assert plan.status.start_time == NOON
    assert plan.status.attempt == 1
    assert [(event.reason, event.message) for event in plan.events] == [
        (Reason.CREATED, "Creating 1 master, 2 parameter servers, 3 workers")
    ]


def test_the_pass_that_tells_of_the_beginning_need_not_be_the_one_that_made_the_pods():
    scene = make_job()
    blank = scene.status
    first = scene.step()
    scene.status = blank  # nothing was written: it had to wait, or the operator was killed
    scene.after(3)
    second = scene.plan()
    assert second.actions == ()
    assert second.events == first.events
    assert (second.status.start_time, second.status.attempt) == (scene.now, 1)


def test_network_policy_none_makes_none():
    plan = make_job().spec(network={"policy": "None"}).step()
    assert Create(kind=ChildKind.NETWORK_POLICY) not in plan.actions


def test_a_service_or_policy_that_somebody_deleted_is_made_again():
    scene = make_job().training()
    scene.children = frozenset()
    assert scene.step().actions == (Create(kind=ChildKind.SERVICE), Create(kind=ChildKind.NETWORK_POLICY))
    assert scene.status.state is JobState.TRAINING


def test_states_of_a_job_on_its_way():
    scene = make_job()
    states = []
    for change in (
        lambda: None,
        lambda: None,
        scene.all_run,
        lambda: scene.reports(7),
        lambda: scene.succeeded(0, 1, ago=20),
    ):
        change()
        scene.seen()
        states.append(scene.status.state)
    assert states == [JobState.SCHEDULING, JobState.SCHEDULING, JobState.STARTING, JobState.TRAINING, JobState.COMPLETE]


def test_a_pass_over_an_unchanged_world_changes_nothing():
    scene = make_job().servers(1).training().after(3)
    plan = scene.plan()
    assert plan.status == scene.status
    assert plan.actions == ()
    assert plan.events == ()


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


def all_is_done(scene, *, ago=0):
    done = Progress(attempt=1, step=100, total_steps=100, world_size=1, finished=True)
    return scene.succeeded(0, role=MASTER, ago=ago, termination=Termination(progress=done))


def test_a_master_that_ended_without_a_last_word_completes_nothing():
    scene = make_job().training().succeeded(0, ago=60).succeeded(0, role=MASTER)
    scene.step()
    assert scene.says("Complete")[0] == "False"


def test_a_command_is_complete_with_its_workers_whose_master_hears_nothing_of_it():
    scene = make_job().command().training(100).succeeded(0, 1)
    scene.step()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


def test_a_success_whose_workers_trained_apart_says_so():
    scene = make_job().command().training()
    scene.reports(100, warning="no process reported a world of more than 1").succeeded(0, 1)
    scene.step()
    warned = "2 of 2 workers succeeded. Warning: no process reported a world of more than 1"
    assert scene.condition("Complete").message == warned


def test_what_pods_are_waited_for_is_said_as_it_is():
    scene = make_job()
    scene.step()
    assert scene.condition("Scheduled").message == "Creating the pods"


def test_the_master_has_ten_seconds_to_end_after_the_workers():
    scene = make_job().training().succeeded(0, 1)
    assert scene.step().look_again == timedelta(seconds=5)  # the status interval comes first
    assert scene.status.completion_time is None
    scene.after(9).step()
    assert scene.status.completion_time is None
    scene.after(1).step()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


def test_the_final_progress_comes_from_the_last_words_of_the_master():
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


def test_any_worker_completes_the_job_when_the_policy_says_so():
    scene = make_job().spec(successPolicy="AnyWorker").training().succeeded(1, ago=11)
    scene.step()
    assert scene.says("Complete") == ("True", "WorkersSucceeded")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        pytest.param("Running", ["digits-master-0", "digits-ps-0"], id="Running deletes what still runs"),
        pytest.param(
            "All", ["digits-master-0", "digits-ps-0", "digits-worker-0", "digits-worker-1"], id="All deletes all"
        ),
        pytest.param("None", [], id="None deletes nothing"),
    ],
)
def test_clean_pod_policy(policy, expected):
    scene = make_job().servers(1).run_policy(cleanPodPolicy=policy).training().succeeded(0, 1, ago=30)
    ended = scene.step()
    assert deleted(ended) == [], "the end is written down before anything is cleaned up"
    assert deleted(scene.step()) == expected
    assert scene.step().actions == ()


def test_the_status_of_a_finished_job_is_final():
    scene = make_job().training().succeeded(0, 1, ago=30).seen()
    final = scene.status
    scene.gone(0).after(1000).spec(suspend=True)
    plan = scene.plan()
    assert plan.status == final
    assert not [action for action in plan.actions if isinstance(action, CreatePod)]


def test_a_finished_job_is_deleted_when_its_ttl_is_over():
    scene = make_job().run_policy(ttlSecondsAfterFinished=60).training().succeeded(0, 1, ago=30).seen()
    assert scene.plan().look_again == timedelta(seconds=60)
    scene.after(59)
    assert scene.plan().actions == ()
    scene.after(1)
    assert scene.plan().actions == (DeleteJob(),)


@pytest.mark.parametrize(
    "scene",
    [
        pytest.param(make_job().spec(managedBy="kueue.x-k8s.io/multikueue"), id="a job of another controller"),
        pytest.param(make_job().metadata(deletionTimestamp="2026-01-01T00:00:00Z"), id="a job that is being deleted"),
    ],
)
def test_hands_off(scene):
    plan = scene.plan()
    assert (plan.actions, plan.status, plan.events, plan.look_again) == ((), scene.status, (), None)


def test_decide_is_a_function():
    scene = make_job().servers(2).training().failed(0).failed(1, SERVER)
    assert decide(scene.snapshot) == decide(scene.snapshot)


def test_network_policy_goes_when_nobody_wants_it_any_more():
    scene = make_job().training().spec(network={"policy": "None"})
    assert scene.step().actions == (Delete(kind=ChildKind.NETWORK_POLICY),)
    assert scene.step().actions == ()
    assert Create(kind=ChildKind.NETWORK_POLICY) in scene.spec(network={"policy": "JobOnly"}).step().actions


def test_a_worker_that_crashes_after_the_master_said_that_all_is_done_fails_nothing() -> None:
    scene = make_job().run_policy(backoffLimit=0).training().after(5).reports(100, finished=True).seen()
    assert not scene.succeeded(0).failed(1, code=139).seen().status.is_true("Failed")


def test_a_master_that_is_evicted_after_its_last_words_said_that_all_is_done_is_done() -> None:
    done = Termination(progress=Progress(attempt=1, step=100, finished=True))
    scene = make_job().training().after(5).gone(1).seen().succeeded(0)
    assert scene.failed(0, MASTER, code=0, reason="Evicted", termination=done).seen().status.is_true("Complete")
