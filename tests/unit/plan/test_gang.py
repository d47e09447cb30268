"""A gang: its PodGroup comes first and stays through replacements, and a gang of which a part finds no node gives all nodes back."""

from datetime import timedelta

import pytest

from disttrain.api.names import POD_GROUPS, ChildKind
from disttrain.api.reasons import JobState, Reason
from disttrain.plan import decide
from disttrain.plan.model import Create, CreatePod, Delete, Phase, Refusal
from unit.plan.builders import MASTER, WORKER, Scene, created, deleted, make_job

GROUP, VOLCANO = ChildKind.COSCHEDULING_GROUP, ChildKind.VOLCANO_GROUP
NO_NODE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def gang(**scheduling: object) -> Scene:
    return make_job().spec(scheduling={"gang": "Coscheduling", "timeoutSeconds": 300, **scheduling})


def places(scene: Scene, *ranks: int) -> Scene:
    """These workers and the master find nodes; the scheduler says of the others that there is none."""
    for pod in list(scene.pods.values()):
        if pod.role is MASTER or pod.index in ranks:
            scene.change(pod.index, pod.role, scheduled=True, node="node-1")
        else:
            scene.change(pod.index, pod.role, reason="Unschedulable", message=NO_NODE)
    return scene


def waits() -> Scene:
    """One of two workers finds no node."""
    scene = gang()
    scene.step()
    return places(scene, 0).seen()


def test_the_pod_group_is_made_before_anything_else_and_the_pods_name_it():
    plan = gang().step()
    assert plan.actions[0] == Create(kind=GROUP)
    pods = [action for action in plan.actions if isinstance(action, CreatePod)]
    assert [pod.pod_group for pod in pods] == [GROUP] * 3


@pytest.mark.parametrize("asked", ["Auto", "None"])
def test_a_job_without_a_gang_has_no_pod_group(asked: str):
    plan = make_job().spec(scheduling={"gang": asked}).step()
    assert Create(kind=GROUP) not in plan.actions
    assert {action.pod_group for action in plan.actions if isinstance(action, CreatePod)} == {None}


def test_a_pod_group_that_another_client_deletes_is_made_again():
    scene = gang().training()
    scene.children -= {GROUP}
    assert scene.step().actions == (Create(kind=GROUP),)
    assert scene.status.state is JobState.TRAINING


def test_a_pod_that_replaces_another_one_is_of_the_same_group():
    scene = gang().training().failed(1)
    scene.seen().after(1)
    scene.step()
    (pod,) = [action for action in scene.step().actions if isinstance(action, CreatePod)]
    assert pod.pod_group is GROUP
    assert GROUP in scene.children


def test_a_scheduler_whose_pod_groups_the_cluster_does_not_have_is_one_condition_and_nothing_is_made():
    scene = gang()
    scene.unavailable = frozenset({GROUP})
    plan = scene.step()
    assert plan.actions == ()
    assert scene.says("Valid") == ("False", "GangSchedulerNotFound")
    assert scene.condition("Valid").message == (
        "The cluster has no podgroups.scheduling.x-k8s.io for scheduling.gang Coscheduling, or the operator has no right to them; "
        "install the scheduler and deploy/components/gang-scheduling, or set scheduling.gang to None"
    )
    assert [event.reason for event in plan.events] == [Reason.GANG_SCHEDULER_NOT_FOUND]
    assert scene.step().events == ()
    scene.unavailable = frozenset()
    assert len(created(scene.step())) == 3


def test_pods_of_a_job_that_trains_stay_when_the_pod_groups_of_the_cluster_are_removed():
    scene = gang().training()
    scene.unavailable, scene.children = frozenset({GROUP}), scene.children - {GROUP}
    assert scene.step().actions == ()
    assert scene.status.state is JobState.TRAINING


def test_a_queue_of_kueue_under_auto_is_not_supported():
    scene = make_job().metadata(labels={"kueue.x-k8s.io/queue-name": "team"})
    assert scene.step().actions == ()
    assert scene.says("Valid") == ("False", "NotYetSupported")
    assert "kueue.x-k8s.io/queue-name" in scene.condition("Valid").message
    assert len(created(scene.spec(scheduling={"gang": "None"}).step())) == 3


def test_a_job_that_runs_with_the_label_of_a_queue_goes_on_until_it_is_suspended():
    scene = make_job().training().metadata(labels={"kueue.x-k8s.io/queue-name": "team"}).gone(1)
    assert created(scene.step()) == [(WORKER, 1)]
    assert scene.says("Valid") == ("True", "Accepted")
    scene.spec(suspend=True).seen().spec(suspend=False).seen()
    assert (scene.pods, scene.says("Valid")) == ({}, ("False", "NotYetSupported"))
    scene.metadata(labels={}).seen()
    assert (len(scene.pods), scene.says("Valid")) == (3, ("True", "Accepted"))


def named(scheduler: str, gang: str = "Auto") -> Scene:
    """A job whose workers name a scheduler; the other pods name none."""
    template = {"spec": {"schedulerName": scheduler}}
    return make_job().spec(scheduling={"gang": gang}, worker={"replicas": 2, "template": template})


@pytest.mark.parametrize(("name", "kind"), [("scheduler-plugins-scheduler", GROUP), ("volcano", VOLCANO)])
def test_auto_is_the_scheduler_that_the_templates_name_where_the_cluster_has_it(name: str, kind: ChildKind):
    assert Create(kind=kind) in named(name).step().actions
    scene = named(name)
    scene.unavailable = frozenset({kind})
    plan = scene.step()
    assert not [action for action in plan.actions if isinstance(action, Create) and action.kind in POD_GROUPS]
    assert len(created(plan)) == 3


def test_auto_is_no_gang_with_another_scheduler_and_none_is_no_gang_with_any():
    assert len(created(named("mine").step())) == 3
    assert len(created(named("volcano", gang="None").step())) == 3


def test_auto_makes_no_pod_group_for_pods_that_are_there_and_keeps_one_that_is():
    scene = named("scheduler-plugins-scheduler")
    scene.unavailable = frozenset({GROUP})
    scene.training()
    scene.unavailable = frozenset()
    assert scene.step().actions == ()
    scene = named("scheduler-plugins-scheduler").training().failed(1)
    scene.seen().after(1).seen()
    assert GROUP in scene.children
    assert len(scene.pods) == 3


def test_auto_gives_its_nodes_back_and_is_the_same_gang_again():
    scene = named("scheduler-plugins-scheduler")
    scene.step()
    places(scene, 0).seen().after(600).seen()
    assert (scene.pods, GROUP in scene.children) == ({}, False)
    assert scene.after(120).step().actions[0] == Create(kind=GROUP)


def test_pods_of_volcano_are_made_when_their_pod_group_has_left_phase_pending():
    scene = make_job().spec(scheduling={"gang": "Volcano"})
    plan = scene.step()
    assert (plan.actions[0], created(plan)) == (Create(kind=VOLCANO), [])
    assert scene.step().actions == ()
    assert scene.says("Scheduled") == ("False", "WaitingForGang")
    assert "has no phase yet" in scene.condition("Scheduled").message
    scene.pod_group_phase = "Pending"
    assert scene.after(9000).step().actions == ()
    assert (
        scene.condition("Scheduled").message == "PodGroup digits is in phase Pending: its queue has no room for it yet"
    )
    assert (scene.status.state, scene.status.start_time) == (JobState.PENDING, None)
    scene.pod_group_phase = "Inqueue"
    assert [pod.pod_group for pod in scene.step().actions if isinstance(pod, CreatePod)] == [VOLCANO] * 3


def test_a_pod_group_that_is_not_admitted_after_a_disruption_stays():
    scene = make_job().spec(scheduling={"gang": "Volcano"})
    scene.pod_group_phase = "Inqueue"
    scene.training()
    scene.pods.clear()
    scene.pod_group_phase = "Pending"
    assert scene.step().actions == ()
    assert scene.says("Scheduled") == ("False", "WaitingForGang")
    assert scene.status.disruptions.in_a_row == 1
    assert scene.step().actions == (), "its place in the queue is kept"
    scene.pod_group_phase = "Inqueue"
    assert len(created(scene.step())) == 3


def test_a_pod_that_replaces_another_one_does_not_wait_for_the_phase_of_its_group():
    scene = make_job().spec(scheduling={"gang": "Volcano"})
    scene.pod_group_phase = "Inqueue"
    scene.training().gone(1)
    scene.pod_group_phase = "Pending"
    assert created(scene.step()) == [(WORKER, 1)]


def test_a_gang_that_waits_says_how_many_pods_have_a_node_and_what_keeps_the_first_other_from_one():
    scene = waits()
    assert scene.says("Scheduled") == ("False", "WaitingForGang")
    assert scene.condition("Scheduled").message == f"2 of 3 placed; digits-worker-1: {NO_NODE}"
    assert scene.status.state is JobState.SCHEDULING


def test_the_obstacle_is_a_pod_that_fits_no_node_and_not_one_that_waits_for_it():
    scene = gang()
    scene.step()
    siblings = "pod rejected while waiting on permit: other pods of the group are missing"
    scene.change(0, MASTER, reason="Unschedulable", message=siblings)
    scene.change(1, reason="Unschedulable", message=NO_NODE)
    scene.seen()
    assert scene.condition("Scheduled").message == f"0 of 3 placed; digits-worker-1: {NO_NODE}"


def test_a_gang_of_which_a_part_finds_no_node_in_time_gives_all_nodes_back():
    scene = waits()
    assert scene.plan().look_again == timedelta(seconds=300)
    assert deleted(scene.after(299).step()) == []
    plan = scene.after(1).step()
    assert (plan.actions, plan.final, plan.look_again) == ((), True, timedelta(0)), "it is written down first"
    assert [(event.reason, event.warning) for event in plan.events] == [("GangTimedOut", True)]
    message = (
        f"2 of 3 placed; digits-worker-1: {NO_NODE}. Not all had a node within 300 s (scheduling.timeoutSeconds): "
        "every pod is deleted, so that other jobs can have the nodes, and created again later"
    )
    assert (scene.says("Scheduled"), scene.condition("Scheduled").message) == (("False", "GangTimedOut"), message)
    plan = scene.step()
    assert (deleted(plan), created(plan)) == (["digits-master-0", "digits-worker-0", "digits-worker-1"], [])
    assert scene.condition("Scheduled").message == message


def test_a_gang_that_gave_its_nodes_back_counts_no_failure_and_is_pending():
    scene = waits().after(300).seen()
    assert scene.pods == {}
    assert scene.status.state is JobState.PENDING
    assert scene.says("Restarting") == ("False", "NoFailure")
    assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (0, 0)


def test_a_gang_that_gave_its_nodes_back_has_no_pod_group_until_it_tries_again():
    scene = waits().after(300)
    scene.step()
    assert Delete(kind=GROUP) not in scene.step().actions, "pods of it still end"
    plan = scene.step()
    assert (plan.actions, plan.look_again) == ((Delete(kind=GROUP),), timedelta(seconds=120))
    assert scene.after(119).step().actions == ()
    plan = scene.after(1).step()
    assert plan.actions[0] == Create(kind=GROUP)
    assert len(created(plan)) == 3
    assert scene.status.attempt == 2


def test_a_gang_tries_again_when_the_last_pod_of_the_former_attempt_is_gone():
    scene = waits().after(300)
    scene.step()
    ending = scene.pod(0)
    scene.step()
    scene.pods[ending.name] = ending
    scene.change(0, deleting=True).after(150)
    assert created(scene.step()) == []
    scene.gone(0)
    assert len(created(scene.step())) == 3


def test_a_gang_whose_pods_another_client_deletes_while_they_wait_has_given_nothing_back():
    scene = waits()
    scene.pods.clear()
    assert len(created(scene.step())) == 3
    places(scene, 0).seen().pods.clear()
    scene.step()
    assert (scene.status.disruptions.in_a_row, scene.says("Scheduled")) == (2, ("False", "Scheduling"))
    assert GROUP in scene.children
    assert len(created(scene.after(2).step())) == 3


def test_a_pod_that_is_created_again_after_a_pause_has_the_whole_time():
    scene = gang(timeoutSeconds=60).training()
    for lost in range(1, 8):
        scene.gone(1).seen().after(1 << lost).seen()
    since = scene.now
    scene.gone(1).seen().after(100).step()
    assert ((WORKER, 1) in [(pod.role, pod.index) for pod in scene.pods.values()], scene.status.attempt) == (False, 1)
    scene.after(28).seen()
    assert (scene.pod(1).created - since, scene.status.attempt) == (timedelta(seconds=128), 1)
    scene.after(59).seen()
    assert scene.status.attempt == 1
    scene.after(1).seen()
    assert scene.status.attempt == 2


def test_a_second_try_has_the_whole_time_again_and_the_pause_grows():
    scene = waits().after(300).seen().after(120).seen()
    places(scene, 0).seen()
    assert deleted(scene.after(299).step()) == []
    scene.after(1).seen()
    assert scene.status.attempt == 3
    assert scene.status.disruptions.in_a_row == 2


def test_a_gang_whose_pods_all_find_nodes_in_time_starts():
    scene = waits().after(299).all_run().seen()
    assert scene.says("Scheduled") == ("True", "AllPodsScheduled")
    assert scene.after(900).reports(1).seen().status.attempt == 1


def test_a_job_that_trains_and_loses_a_pod_gives_its_nodes_back_when_there_is_no_other_node():
    scene = gang().training().gone(1)
    scene.step()
    scene.change(1, reason="Unschedulable", message=NO_NODE).seen()
    assert scene.says("Scheduled") == ("False", "WaitingForGang")
    assert scene.condition("Scheduled").message == f"2 of 3 placed; digits-worker-1: {NO_NODE}"
    assert scene.status.state is JobState.RESTARTING
    assert deleted(scene.after(299).step()) == []
    scene.after(1).step()
    assert scene.status.state is JobState.RESTARTING
    assert scene.status.attempt == 2
    assert len(deleted(scene.step())) == 3
    scene.seen().after(120)
    assert len(created(scene.step())) == 3
    assert scene.status.restarts.total == 0


def test_pods_that_a_quota_refuses_end_the_wait_of_the_others_too():
    scene = gang()
    scene.step()
    scene.gone(1)
    scene.refusals = (Refusal(name="Pod digits-worker-1", message="exceeded quota", retryable=True, time=scene.now),)
    places(scene, 0).seen()
    assert scene.says("Scheduled") == ("False", "PodRefused")
    scene.after(300).step()
    assert scene.condition("Scheduled").message.startswith(
        "2 of 3 placed; Pod digits-worker-1: exceeded quota. Not all"
    )
    assert scene.status.attempt == 2


def test_a_gang_that_holds_nothing_waits_without_end():
    scene = gang()
    scene.step()
    scene.pods.clear()
    scene.refusals = (Refusal(name="Pod digits-master-0", message="exceeded quota", retryable=True, time=scene.now),)
    scene.seen().after(3000)
    assert scene.step().status.attempt == 1


def test_a_scheduler_that_says_nothing_is_the_obstacle():
    scene = gang()
    scene.step()
    scene.seen().after(300).step()
    message = "0 of 3 placed; digits-master-0: scheduler scheduler-plugins-scheduler has said nothing of it; see whether it runs"
    assert scene.condition("Scheduled").message.startswith(message)


def test_a_failure_is_written_down_before_the_nodes_are_given_back():
    scene = waits().failed(0).after(300)
    scene.step()
    assert (scene.status.attempt, scene.status.restarts.total) == (1, 1)


def test_an_elastic_gang_needs_its_fewest_workers_and_goes_on_without_the_others():
    scene = make_job().servers(1).spec(scheduling={"gang": "Coscheduling", "timeoutSeconds": 300})
    scene.spec(worker={"replicas": 3, "elastic": {"minReplicas": 2, "maxReplicas": 4}})
    scene.step()
    for pod in list(scene.pods.values()):
        if pod.role is WORKER and pod.index == 2:
            scene.change(2, reason="Unschedulable", message=NO_NODE)
        else:
            scene.change(pod.index, pod.role, phase=Phase.RUNNING, scheduled=True, ready=True, node="node-1")
    scene.seen()
    assert scene.says("Scheduled") == ("False", "Unschedulable")
    scene.after(300).seen()
    assert (scene.status.worker.target_replicas, scene.status.attempt) == (2, 1)


def test_workers_of_an_elastic_gang_beyond_its_fewest_stand_in_for_no_master():
    scene = gang().servers(1).spec(worker={"replicas": 4, "elastic": {"minReplicas": 2, "maxReplicas": 4}})
    scene.step()
    for pod in list(scene.pods.values()):
        if pod.role is MASTER:
            scene.change(0, MASTER, reason="Unschedulable", message=NO_NODE)
        else:
            scene.change(pod.index, pod.role, phase=Phase.RUNNING, scheduled=True, node="node-1")
    scene.seen()
    assert scene.condition("Scheduled").message == f"3 of 4 placed; digits-master-0: {NO_NODE}"
    scene.after(300).seen()
    assert (scene.pods, scene.says("Scheduled")) == ({}, ("False", "GangTimedOut"))


def test_the_pod_group_goes_while_the_job_is_suspended_and_comes_again_with_its_pods():
    scene = gang().training().spec(suspend=True).seen()
    assert scene.status.state is JobState.SUSPENDED
    assert GROUP not in scene.children
    scene.spec(suspend=False).seen()
    assert GROUP in scene.children
    assert len(scene.pods) == 3


def test_the_pod_group_goes_at_the_end_of_the_job():
    scene = gang().training().succeeded(0, 1).succeeded(0, role=MASTER).seen()
    assert scene.status.state is JobState.COMPLETE
    assert GROUP not in scene.children


def test_the_same_snapshot_gives_the_same_plan():
    snapshot = waits().after(300).snapshot
    assert decide(snapshot) == decide(snapshot)
