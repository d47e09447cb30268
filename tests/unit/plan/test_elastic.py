"""An elastic job that gets another number of workers: which pods are made and deleted, and what the status says until it has them."""

from dataclasses import replace

from disttrain.api.reasons import JobState, Reason
from disttrain.plan import decide
from unit.plan.builders import WORKER, Scene, created, deleted, make_job, read_back


class LocalScene(Scene):
    """A local run."""

    @property
    def snapshot(self):
        return replace(super().snapshot, local=True)


def elastic(replicas: int = 2, fewest: int = 1, most: int = 5) -> LocalScene:
    scene = LocalScene(make_job().servers(1).body)
    return scene.spec(worker={"replicas": replicas, "elastic": {"minReplicas": fewest, "maxReplicas": most}})


def trains(replicas: int = 2) -> LocalScene:
    scene = elastic(replicas).started().reports(10, world_size=replicas).seen()
    assert scene.status.state is JobState.TRAINING
    return scene


def test_the_parts_of_a_step_are_those_of_the_most_workers_and_the_target_is_in_the_status():
    scene = trains(2)
    assert scene.status.parts_per_step == 5
    assert scene.status.worker.target_replicas == 2
    assert make_job().training().status.worker.target_replicas is None


def test_more_workers_are_made_in_one_pass_and_the_job_is_resizing_until_the_master_counts_them():
    scene = trains(2).workers(4)
    plan = scene.step()
    assert created(plan) == [(WORKER, 2), (WORKER, 3)]
    assert deleted(plan) == []
    assert [(event.reason, event.message) for event in plan.events] == [
        (Reason.RESIZING, "Resizing from 2 to 4 workers")
    ]
    assert scene.status.state is JobState.RESIZING
    assert scene.status.worker.target_replicas == 4
    assert scene.says("Restarting") == ("False", "NoFailure")
    scene.all_run().after(1).reports(12, world_size=2).seen()
    assert scene.status.state is JobState.RESIZING
    scene.after(1).reports(14, world_size=4).seen()
    assert scene.status.state is JobState.TRAINING
    assert scene.step().events == ()


def test_of_fewer_workers_those_with_the_highest_indexes_leave_and_nothing_is_counted_as_a_failure():
    scene = trains(4).workers(2)
    plan = scene.plan()
    assert deleted(plan) == ["digits-worker-2", "digits-worker-3"]
    scene.status = read_back(plan.status)
    for rank in (2, 3):
        scene.change(rank, deleting=True)
    assert scene.status.state is JobState.RESIZING
    scene.after(1).reports(12, world_size=2).step()
    assert scene.status.state is JobState.RESIZING, "their processes have not ended yet"
    for rank in (2, 3):
        scene.failed(rank, code=143)
    scene.step()
    for rank in (2, 3):
        scene.gone(rank)
    scene.after(1).reports(13, world_size=2).seen()
    assert scene.status.state is JobState.TRAINING
    assert scene.status.restarts is None or scene.status.restarts.total == 0
    assert scene.status.worker.target_replicas == 2


def test_a_worker_that_is_wanted_again_while_its_process_still_ends_is_made_after_it():
    scene = trains(3).workers(2)
    scene.status = read_back(scene.plan().status)
    scene.change(2, deleting=True).workers(3)
    assert created(scene.plan()) == []
    scene.gone(2)
    assert created(scene.plan()) == [(WORKER, 2)]


def test_a_worker_that_is_lost_is_a_restart_and_no_resizing():
    scene = trains(3).failed(1)
    scene.step()
    assert scene.status.state is JobState.RESTARTING


def test_the_job_is_complete_when_the_workers_that_it_has_now_are_done():
    scene = trains(4).workers(1)
    scene.step()
    scene.seen().succeeded(0).after(20).step()
    assert scene.status.state is JobState.COMPLETE
    assert scene.condition("Complete").message == "1 of 1 workers succeeded"


def test_a_script_that_reports_no_steps_is_resizing_too():
    scene = elastic(2)
    scene.body["spec"]["strategy"] = {"type": "DataParallel"}
    del scene.body["spec"]["parameterServer"]
    scene.script().started()

    def master_says(workers: int) -> None:
        scene.after(10).reports(0, total=None, world_size=workers, last_update_time=None).seen()

    for _ in range(2):
        master_says(2)
    assert scene.status.state is JobState.TRAINING
    scene.workers(3).step()
    assert scene.status.state is JobState.RESIZING
    scene.all_run()
    master_says(0)
    assert scene.status.state is JobState.RESIZING
    master_says(3)
    assert scene.status.state is JobState.TRAINING


def test_a_job_that_has_not_begun_to_train_is_starting_whatever_its_number():
    scene = elastic(2).started().workers(3)
    scene.step()
    assert scene.status.state is not JobState.RESIZING


def test_on_a_cluster_an_elastic_job_gets_no_pods():
    scene = Scene(elastic().body)
    plan = decide(scene.snapshot)
    assert plan.actions == ()
    assert "worker.elastic on a cluster" in plan.status.condition("Valid").message
