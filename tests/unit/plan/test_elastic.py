"""An elastic job that gets another number of workers: which pods are made and deleted, and what the status says until it has them."""

from dataclasses import replace
from datetime import timedelta

from disttrain.api.names import Role
from disttrain.api.reasons import JobState, Reason
from disttrain.api.status import Room
from disttrain.plan import decide
from disttrain.plan.model import Phase, Refusal, Write
from unit.plan.builders import MASTER, SERVER, WORKER, Scene, created, deleted, make_job, read_back


def elastic(replicas: int = 2, fewest: int = 1, most: int = 5) -> Scene:
    return (
        make_job()
        .servers(1)
        .spec(worker={"replicas": replicas, "elastic": {"minReplicas": fewest, "maxReplicas": most}})
    )


def trains(replicas: int = 2) -> Scene:
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


def on_nodes(scene: Scene, *slots: tuple[Role, int]) -> Scene:
    """These pods run on a node."""
    for role, index in slots:
        scene.change(index, role, phase=Phase.RUNNING, scheduled=True, ready=True, ready_since=scene.now, reason="")
    return scene


def without_nodes(scene: Scene, *ranks: int) -> Scene:
    """The scheduler finds no node for these workers, and the operator has seen it."""
    for rank in ranks:
        scene.change(
            rank, phase=Phase.PENDING, scheduled=False, ready=False, reason="Unschedulable", message="0/3 nodes"
        )
    return scene.seen()


def crowded(replicas: int = 4, placed: int = 2, fewest: int = 1) -> Scene:
    """An elastic job on a cluster that trains with the workers that have a node, and waits for the others."""
    scene = elastic(replicas, fewest=fewest).spec(scheduling={"timeoutSeconds": 100})
    scene.step()
    on_nodes(scene, (MASTER, 0), (SERVER, 0), *((WORKER, rank) for rank in range(placed)))
    without_nodes(scene, *range(placed, replicas))
    scene.reports(5, world_size=placed).seen()
    return scene


def test_a_job_goes_on_with_the_workers_that_have_a_node_when_the_others_waited_long_enough():
    scene = crowded()
    assert scene.status.worker.target_replicas == 4
    assert scene.after(90).reports(6, world_size=2).plan().look_again <= timedelta(seconds=10)
    assert deleted(scene.plan()) == []
    plan = scene.after(10).reports(7, world_size=2).step()
    assert (plan.write, deleted(plan)) == (Write.NOW, []), "first it is written down"
    plan = scene.step()
    assert deleted(plan) == ["digits-worker-2", "digits-worker-3"]
    [event] = plan.events
    assert event.message == "Resizing from 4 to 2 workers, as the others find no node: digits-worker-2: 0/3 nodes"
    assert scene.status.worker.target_replicas == 2
    scene.reports(8, world_size=2).seen()
    assert scene.status.state is JobState.TRAINING
    assert scene.status.restarts is None or scene.status.restarts.total == 0


def one_leaves_that_has_a_node() -> Scene:
    """Nodes for three of four workers, of which the scheduler gave one to the last: it leaves, and the third may have its node."""
    scene = elastic(4).spec(scheduling={"timeoutSeconds": 100})
    scene.step()
    on_nodes(scene, (MASTER, 0), (SERVER, 0), *((WORKER, rank) for rank in (0, 1, 3)))
    without_nodes(scene, 2).reports(5, world_size=3).seen()
    scene.after(100).reports(6, world_size=3).step()
    plan = scene.plan()
    assert deleted(plan) == ["digits-worker-3"]
    scene.status = read_back(plan.status)
    return scene.change(3, deleting=True).seen()


def test_a_worker_may_have_the_node_of_one_that_leaves():
    scene = one_leaves_that_has_a_node().after(50).reports(7, world_size=2).seen()
    assert scene.status.worker.target_replicas == 3
    del scene.pods["digits-worker-3"]
    on_nodes(scene, (WORKER, 2)).reports(8, world_size=3).seen()
    assert (scene.status.worker.target_replicas, scene.status.state) == (3, JobState.TRAINING)
    assert scene.status.worker.room.workers == 3


def test_a_job_that_became_smaller_waits_once_more_before_it_becomes_smaller_again():
    scene = one_leaves_that_has_a_node()
    del scene.pods["digits-worker-3"]
    scene.after(99).reports(8, world_size=2).step()
    assert scene.status.worker.room.workers == 3
    scene.after(1).reports(9, world_size=2).step()
    assert scene.status.worker.room.workers == 2


def test_a_job_with_nodes_for_fewer_than_its_fewest_workers_waits():
    scene = crowded(placed=1, fewest=2)
    assert scene.after(500).reports(6).plan().status.worker.room is None


def test_a_worker_that_is_still_starting_is_waited_for():
    scene = crowded()
    scene.change(3, reason="").seen()
    assert scene.after(500).reports(6).plan().status.worker.room is None


def test_workers_that_a_quota_refuses_have_no_room_either():
    scene = crowded()
    del scene.pods["digits-worker-3"], scene.pods["digits-worker-2"]
    refusal = Refusal(name="digits-worker-2", message="exceeded quota", retryable=True, time=scene.now)
    scene.refusals = (refusal,)
    scene.seen().after(100).reports(6, world_size=2)
    scene.refusals = (replace(refusal, time=scene.now),)
    scene.step()
    assert scene.status.worker.room == Room(workers=2, since=scene.now)


def shrunk(replicas: int = 4, placed: int = 2) -> Scene:
    """As `crowded`, some time later."""
    scene = crowded(replicas, placed).after(100).reports(6, world_size=placed)
    scene.step()
    scene.step()
    scene.reports(7, world_size=placed).seen()
    assert scene.status.worker.target_replicas == placed
    return scene


def test_one_more_worker_is_tried_after_a_pause_that_doubles_with_each_that_finds_no_node():
    scene = shrunk()
    for pause in (60, 120, 240):
        scene.after(pause - 1).reports(scene.status.training.step + 1, world_size=2)
        assert scene.plan().status.worker.room.probing is False
        scene.after(1).step()
        plan = scene.step()
        assert created(plan) == [(WORKER, 2)]
        assert plan.events == ()
        without_nodes(scene, 2)
        assert scene.status.state is JobState.TRAINING
        scene.after(30).reports(scene.status.training.step + 1, world_size=2).step()
        plan = scene.step()
        assert (deleted(plan), plan.events) == (["digits-worker-2"], ())
        assert scene.status.state is JobState.TRAINING
    assert scene.status.worker.room.failed_probes == 3


def test_workers_that_find_a_node_come_back_one_after_the_other():
    scene = shrunk().after(60)
    scene.step()
    assert created(scene.step()) == [(WORKER, 2)]
    plan = on_nodes(scene, (WORKER, 2)).step()
    assert [event.message for event in plan.events] == ["Resizing from 2 to 3 workers: there is a node again"]
    assert created(scene.step()) == [(WORKER, 3)]
    on_nodes(scene, (WORKER, 3)).step()
    assert scene.status.worker.room is None
    scene.reports(20, world_size=4).seen()
    assert (scene.status.worker.target_replicas, scene.status.state) == (4, JobState.TRAINING)


def test_a_job_that_asks_for_no_more_than_there_is_room_for_has_room():
    scene = shrunk().workers(2)
    scene.step()
    assert scene.status.worker.room is None
    scene = shrunk().after(60)
    scene.step()
    scene.workers(2).step()
    assert (scene.status.worker.room, scene.step().actions) == (None, ())


def test_a_job_that_is_resumed_asks_for_all_its_workers_again():
    scene = shrunk().spec(suspend=True)
    scene.step()
    scene.step()
    for name in list(scene.pods):
        del scene.pods[name]
    scene.step()
    scene.spec(suspend=False).step()
    assert scene.status.worker.room is None
    assert len([slot for slot in created(scene.step()) if slot[0] is WORKER]) == 4


def test_on_a_cluster_an_elastic_job_gets_its_pods_and_a_sharded_one_does_not():
    scene = elastic(2)
    assert len(created(scene.plan())) == 4
    sharded = {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}
    scene.body["spec"]["strategy"] = sharded
    del scene.body["spec"]["parameterServer"]
    plan = decide(scene.snapshot)
    assert plan.actions == ()
    assert "worker.elastic of a model that is cut" in plan.status.condition("Valid").message


def suspended_and_resumed(scene: Scene, hours: float = 1) -> Scene:
    scene.spec(suspend=True).step()
    scene.step()
    scene.pods.clear()
    scene.step()
    scene.after(3600 * hours).step()
    scene.report = None
    scene.spec(suspend=False).step()
    return scene.seen()


def test_a_job_that_is_resumed_waits_for_nodes_from_then_on():
    scene = suspended_and_resumed(crowded())
    on_nodes(scene, (MASTER, 0), (SERVER, 0), (WORKER, 0), (WORKER, 1))
    without_nodes(scene, 2, 3).seen()
    assert scene.status.worker.room is None
    scene.after(99).seen()
    assert scene.status.worker.room is None
    scene.after(1).seen()
    assert scene.status.worker.room.workers == 2


def test_a_job_that_is_resumed_starts_and_is_not_resizing_from_what_there_was_room_for():
    scene = shrunk().spec(suspend=True)
    scene.step()
    scene.step()
    scene.pods.clear()
    scene.step()
    plan = scene.spec(suspend=False).step()
    assert scene.status.worker.target_replicas == 4
    plans = [plan, scene.step(), scene.step()]
    assert [event.reason for one in plans for event in one.events] == [Reason.RESUMED]
    assert scene.status.state is JobState.SCHEDULING


def test_a_probe_takes_nothing_from_what_the_job_has():
    scene = shrunk().after(60).reports(8, world_size=2)
    scene.step()
    scene.step()
    before = scene.status
    without_nodes(scene, 2)
    assert scene.status.worker.room.probing
    for condition in ("Scheduled", "Ready", "Restarting"):
        assert scene.condition(condition) == before.condition(condition)
    assert scene.says("Ready") == ("True", "AllPodsReady")


def test_a_probe_that_an_edit_of_the_range_makes_a_worker_is_waited_for():
    scene = shrunk().after(60).reports(8, world_size=2)
    scene.step()
    scene.step()
    scene.spec(worker={"elastic": {"minReplicas": 3, "maxReplicas": 5}})
    without_nodes(scene, 2)
    assert scene.says("Ready") == ("False", "Starting")


def test_a_training_that_hangs_is_found_though_probes_come_and_go():
    scene = shrunk().run_policy(progressDeadlineSeconds=3000)
    begun = scene.status.training.last_update_time
    while scene.says("Progressing")[1] != "Stalled" and scene.status.attempt == 1:
        assert (scene.now - begun).total_seconds() < 3100
        scene.after(30)
        scene.report_read = scene.now
        scene.step()
        for name, pod in scene.pods.items():
            scene.pods[name] = pod if pod.scheduled else replace(pod, reason="Unschedulable", message="0/3 nodes")
    assert scene.status.worker.room.failed_probes > 3


def test_a_refusal_of_a_worker_that_the_job_does_without_says_nothing_of_the_others():
    scene = crowded()
    del scene.pods["digits-worker-3"], scene.pods["digits-worker-2"]
    refusal = Refusal(name="digits-worker-2", message="exceeded quota", retryable=True, time=scene.now)
    scene.refusals = (refusal,)
    scene.seen().after(100).reports(6, world_size=2).seen()
    assert scene.status.worker.room.workers == 2
    scene.after(20).reports(7, world_size=2).seen()
    plan = scene.gone(1).plan()
    assert created(plan) == [(WORKER, 1)]
    assert plan.status.condition("Scheduled").reason == Reason.SCHEDULING
    assert plan.status.disruptions.in_a_row == 1, "a pod that others delete again and again is paused"


def test_a_node_that_is_lost_after_probes_that_found_none_makes_the_job_smaller_and_says_so():
    scene = shrunk()
    scene.after(60).reports(8, world_size=2).step()
    scene.step()
    without_nodes(scene, 2)
    scene.after(30).reports(9, world_size=2).step()
    scene.seen()
    assert scene.status.worker.room.failed_probes == 1
    scene.gone(1).step()
    without_nodes(scene, 1)
    plans = []
    while scene.status.worker.target_replicas != 1:
        scene.after(1).reports(scene.status.training.step + 1, world_size=1)
        plans.append(scene.step())
        assert len(plans) < 300
    messages = [event.message for plan in plans for event in plan.events if event.reason == Reason.RESIZING]
    assert messages == [
        "Resizing from 2 to 1 workers, as the others find no node: digits-worker-1: 0/3 nodes",
    ]


def test_fewer_workers_than_there_is_room_for_are_a_resizing_also_after_probes():
    scene = shrunk(4, placed=3)
    scene.after(60).reports(8, world_size=3).step()
    scene.step()
    without_nodes(scene, 3)
    scene.after(30).reports(9, world_size=3).step()
    scene.seen().workers(1)
    plan = scene.step()
    assert [event.message for event in plan.events] == ["Resizing from 3 to 1 workers"]
    assert scene.status.state is JobState.RESIZING
    scene.seen()
    assert scene.status.worker.room is None
