"""spec.suspend at any time: every pod freed, and a new attempt on resume."""

import pytest

from disttrain.api.reasons import JobState
from disttrain.api.runtime import Progress, ProgressCheckpoint
from disttrain.api.status import ReplicaStatus
from disttrain.api.termination import Termination
from disttrain.manifests.environment import cluster_addresses, job_config
from unit.plan.builders import MASTER, SERVER, WORKER, created, deleted, make_job


def suspended():
    scene = make_job().training().failed(0).seen()
    scene.after(1).seen().all_run().seen()
    return scene.spec(suspend=True)


def test_pods_get_their_own_grace_period_and_the_job_is_suspended_only_when_they_are_gone():
    scene = suspended()
    assert scene.step().actions == (), "that it is suspended is written down first"
    plan = scene.plan()
    assert sorted(deleted(plan)) == ["digits-master-0", "digits-worker-0", "digits-worker-1"]
    assert {action.grace_seconds for action in plan.actions} == {None}
    for rank in (0, 1):
        scene.change(rank, deleting=True)
    scene.change(0, MASTER, deleting=True)
    assert scene.step().actions == ()
    assert scene.says("Suspended") == ("False", "Suspending")
    assert scene.status.state is JobState.TRAINING
    scene.pods.clear()
    plan = scene.step()
    assert scene.says("Suspended") == ("True", "Suspended")
    assert scene.status.state is JobState.SUSPENDED
    assert [event.reason for event in plan.events] == ["Suspended"]
    scene.after(60)  # the master's last report is too old to believe: nothing depends on the time any more
    plan = scene.plan()
    assert (plan.actions, plan.look_again, plan.events, plan.status) == ((), None, (), scene.status)


def test_a_suspension_that_is_taken_back_before_all_is_gone_begins_another_attempt() -> None:
    scene = make_job().run_policy(activeDeadlineSeconds=1800).training().seen().spec(suspend=True)
    scene.step()
    for action in scene.plan().actions:
        scene.carry_out(action)  # the operator ends here, and what it would write now is lost
    scene.after(3600).new_operator().spec(suspend=False).seen()
    assert scene.status.attempt == 2
    assert not scene.finished


def test_the_last_word_of_the_master_names_the_newest_checkpoint():
    """The master saves once more when it is asked to end, and no report of it is read any more."""
    scene = suspended().reports(10)
    scene.step()
    saved = ProgressCheckpoint(step=12, time=scene.now)
    last_progress = Progress(attempt=1, step=12, total_steps=100, world_size=2, last_checkpoint=saved)
    scene.failed(0, MASTER, code=143, deleting=True, termination=Termination(progress=last_progress))
    scene.step()
    assert (scene.status.training.step, scene.status.training.last_checkpoint.step) == (12, 12)


def test_a_report_that_was_read_before_the_last_word_of_the_master_does_not_undo_it():
    scene = suspended().reports(10)
    scene.step()
    saved = ProgressCheckpoint(step=12, time=scene.now)
    last_progress = Progress(attempt=1, step=12, total_steps=100, world_size=2, last_checkpoint=saved)
    scene.failed(0, MASTER, code=143, deleting=True, termination=Termination(progress=last_progress)).step()
    scene.pods.clear()
    scene.after(60).seen()
    assert scene.status.state is JobState.SUSPENDED
    assert (scene.status.training.step, scene.status.training.last_checkpoint.step) == (12, 12)


def test_pods_that_fail_on_their_way_out_are_not_counted():
    scene = suspended()
    before = scene.status.restarts
    scene.change(0, deleting=True).failed(0, code=1).change(1, deleting=True).failed(1, code=143)
    scene.step()
    assert scene.status.restarts == before


def test_a_failure_at_the_moment_of_suspension_does_not_fail_the_job():
    scene = suspended().failed(1, code=1)
    scene.seen()
    assert scene.status.state is JobState.SUSPENDED


def test_resume_is_a_new_attempt_with_new_clocks():
    scene = suspended().seen().after(3600).spec(suspend=False)
    recorded = scene.step()
    assert recorded.actions == ()
    assert (scene.status.attempt, scene.status.start_time) == (2, scene.now)
    assert (scene.status.restarts.counted_towards_limit, scene.status.restarts.total) == (0, 1)
    assert scene.says("Suspended") == ("False", "Resumed")
    assert created(scene.step()) == [(MASTER, 0), (WORKER, 0), (WORKER, 1)]
    scene.all_run().reports(10).seen()
    assert scene.status.state is JobState.TRAINING
    assert scene.says("Suspended") == ("False", "Resumed")


def test_resume_before_the_last_pod_is_gone_waits_for_it():
    scene = suspended()
    for rank in (0, 1):
        scene.change(rank, deleting=True)
    scene.change(0, MASTER, deleting=True).step()
    scene.spec(suspend=False).step()
    assert scene.status.attempt == 2
    assert created(scene.step()) == []
    scene.pods.clear()
    assert len(created(scene.step())) == 3


def test_a_job_that_is_created_suspended_gets_nothing():
    scene = make_job().spec(suspend=True)
    assert scene.step().actions == ()
    assert scene.status.state is JobState.SUSPENDED
    assert (scene.status.attempt, scene.status.start_time) == (None, None)
    scene.after(100).spec(suspend=False)
    assert scene.step().actions == (), "as long as its status says Suspended, its image may be changed"
    assert scene.says("Suspended") == ("False", "NotSuspended")
    assert created(scene.step()) == [(MASTER, 0), (WORKER, 0), (WORKER, 1)]
    assert (scene.status.attempt, scene.status.start_time) == (1, scene.now)


@pytest.mark.parametrize("field", ["startupDeadlineSeconds", "activeDeadlineSeconds", "progressDeadlineSeconds"])
def test_no_deadline_runs_while_suspended_and_each_starts_again(field):
    scene = suspended().run_policy(**{field: 600})
    scene.seen().after(100_000).seen()
    assert scene.status.state is JobState.SUSPENDED
    scene.spec(suspend=False).seen().after(590).seen()
    assert not scene.status.is_true("Failed")


def test_work_that_is_done_is_complete_whatever_the_suspension():
    scene = make_job().training().succeeded(0, 1, ago=20).spec(suspend=True)
    scene.step()
    assert scene.status.state is JobState.COMPLETE


def test_workers_that_had_succeeded_run_again_in_the_new_attempt():
    scene = make_job().training().succeeded(0).seen().spec(suspend=True).seen().spec(suspend=False).seen()
    assert sorted(name for name in scene.pods if "worker" in name) == ["digits-worker-0", "digits-worker-1"]
    assert scene.status.worker.completed_indexes is None


def test_a_job_that_goes_on_does_not_say_that_it_is_suspended():
    for scene in (suspended(), make_job().spec(suspend=True)):
        scene.seen().after(10).spec(suspend=False)
        for _ in range(5):
            scene.step()
            said = [condition.message for condition in scene.status.conditions]
            assert not [message for message in said if "spec.suspend is set" in message]
            assert [c.type for c in scene.status.conditions if c.reason == "Suspended"] == []


def resumed_as(before, **spec):
    """A job that was suspended, changed, and set to go on."""
    before.training().reports(10).seen().spec(suspend=True).seen()
    assert before.status.state is JobState.SUSPENDED
    for field in ("strategy", "parameterServer"):
        before.body["spec"].pop(field, None)
    return before.spec(suspend=False, **spec).seen()


def test_a_job_that_goes_on_with_fewer_servers_has_exactly_those():
    scene = make_job().servers(3)
    resumed_as(scene, strategy=scene.body["spec"]["strategy"], parameterServer={"replicas": 2})
    assert sorted(name for name in scene.pods if "-ps-" in name) == ["digits-ps-0", "digits-ps-1"]
    assert {pod.attempt for pod in scene.pods.values()} == {2}


def test_a_job_that_goes_on_without_servers_counts_none_but_keeps_their_restarts():
    scene = make_job().servers(2).training().failed(0, SERVER).seen()
    scene.after(1).seen().all_run().seen()
    resumed_as(scene, strategy={"type": "DataParallel"})
    assert sorted(scene.pods) == ["digits-master-0", "digits-worker-0", "digits-worker-1"]
    (servers,) = [status for status in scene.status.replica_statuses if status.role == "ParameterServer"]
    assert servers == ReplicaStatus(role="ParameterServer", restarts=1)
    assert scene.status.restarts.total == sum(status.restarts for status in scene.status.replica_statuses)


def test_a_job_that_goes_on_with_servers_gets_them():
    scene = resumed_as(
        make_job(),
        strategy={"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}},
        parameterServer={"replicas": 2},
    )
    assert sorted(name for name in scene.pods if "-ps-" in name) == ["digits-ps-0", "digits-ps-1"]


@pytest.mark.parametrize(("named", "expected"), [(None, 2), (6, 6)])
def test_a_job_goes_on_with_other_workers_and_the_parts_that_it_began_with(named: int | None, expected: int) -> None:
    scene = make_job()
    if named is not None:
        scene.spec(trainer={"partsPerStep": named})
    scene.spec(suspend=True).seen()
    assert scene.status.parts_per_step is None, "before it starts, its workers may change"
    scene.spec(suspend=False).training().seen()
    assert scene.status.parts_per_step == expected
    scene.spec(suspend=True).seen().workers(3).spec(suspend=False).seen()
    assert sorted(name for name in scene.pods if "worker" in name) == [f"digits-worker-{index}" for index in range(3)]
    assert scene.status.parts_per_step == expected
    assert job_config(scene.job, 2, cluster_addresses(scene.job)).parts_per_step == expected


def test_processes_learn_of_parts_only_where_there_are_others_than_workers() -> None:
    """A trainer of an earlier release does not know the field."""
    scene = make_job().training().seen()
    addresses = cluster_addresses(scene.job)
    assert "partsPerStep" not in job_config(scene.job, 1, addresses).encode()
    scene.workers(3)
    assert '"partsPerStep":2' in job_config(scene.job, 1, addresses).encode()


def test_a_job_that_began_under_an_earlier_release_keeps_the_parts_of_its_workers() -> None:
    scene = make_job().training().seen()
    scene.status = scene.status.model_copy(update={"parts_per_step": None})
    scene.spec(suspend=True).seen()
    assert scene.status.parts_per_step == 2


def test_a_command_has_no_parts() -> None:
    assert make_job().command().started().status.parts_per_step is None
