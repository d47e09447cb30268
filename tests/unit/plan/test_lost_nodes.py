"""Pods whose node is gone: deleted without the kubelet's confirmation, but only when they were asked to end long ago."""

from datetime import timedelta

import pytest

from disttrain.api.reasons import JobState
from disttrain.plan.model import DeletePod, Phase
from unit.plan.builders import WORKER, created, deleted, make_job


def on_a_lost_node(*, seconds_over: float, **fields):
    scene = make_job().training()
    deadline = scene.now - timedelta(seconds=seconds_over)
    return scene.change(
        1, **{"deleting": True, "deletion_deadline": deadline, "phase": Phase.UNKNOWN, "ready": False, **fields}
    )


def forced(plan):
    return [(action.name, action.grace_seconds) for action in plan.actions if isinstance(action, DeletePod)]


def test_a_minute_after_its_grace_period_the_pod_is_removed_and_made_again():
    scene = on_a_lost_node(seconds_over=59)
    plan = scene.step()
    assert forced(plan) == []
    assert plan.look_again <= timedelta(seconds=1)
    scene.after(1)
    assert forced(scene.step()) == [("digits-worker-1", 0)]
    assert created(scene.step()) == [(WORKER, 1)]


def test_a_pod_that_the_taint_of_its_unreachable_node_deletes_is_removed_too():
    scene = on_a_lost_node(seconds_over=61, phase=Phase.RUNNING, disruption="DeletionByTaintManager")
    assert forced(scene.step()) == [("digits-worker-1", 0)]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"phase": Phase.RUNNING}, id="a node that is only slow"),
        pytest.param({"phase": Phase.RUNNING, "disruption": "EvictionByEvictionAPI"}, id="a node that is drained"),
        pytest.param({"deleting": False}, id="a pod that was not asked to end"),
        pytest.param({"deletion_deadline": None}, id="a grace period that is not known"),
    ],
)
def test_never_without_need(fields):
    assert forced(on_a_lost_node(seconds_over=1000, **fields).step()) == []


def test_a_suspended_job_gets_rid_of_it_too():
    scene = on_a_lost_node(seconds_over=61).spec(suspend=True)
    assert ("digits-worker-1", 0) in forced(scene.step())


def test_a_finished_job_gets_rid_of_it_too():
    scene = on_a_lost_node(seconds_over=61, reason="NodeLost").failed(0, code=1)
    scene.step()
    assert ("digits-worker-1", 0) in forced(scene.step())


class TestSilentNode:
    """Kubernetes takes the readiness of a pod away when its node does not report; 30 s later it deletes the pod."""

    def test_it_is_said_at_once(self):
        scene = make_job().training().after(5)
        scene.reports(11, samples_per_second=64.0).node_falls_silent(1).seen()
        assert scene.status.state is JobState.RESTARTING
        assert scene.says("Ready") == ("False", "NodeLost")
        assert scene.says("Restarting") == ("True", "NodeLost")
        assert (
            "Node node-1 of pod digits-worker-1 does not report since 12:00:05 UTC" in scene.condition("Ready").message
        )

    def test_one_event_says_it(self):
        scene = make_job().training().node_falls_silent(1)
        events = [event for _ in range(20) for event in scene.after(5).step().events]
        assert [event.reason for event in events] == ["NodeLost"]

    def test_its_pod_is_removed_a_minute_later_whatever_its_grace_period(self):
        scene = make_job().training().node_falls_silent(1)
        scene.after(30).change(1, deleting=True, deletion_deadline=scene.now + timedelta(seconds=600))
        assert forced(scene.after(29).step()) == []
        assert scene.plan().look_again <= timedelta(seconds=1)
        assert forced(scene.after(1).step()) == [("digits-worker-1", 0)]
        assert created(scene.step()) == [(WORKER, 1)]

    def test_a_pod_that_was_not_deleted_is_left_to_kubernetes(self):
        scene = make_job().training().node_falls_silent(1)
        assert [plan for _ in range(100) if deleted(plan := scene.after(60).step())] == []

    def test_a_pod_that_the_operator_deleted_itself_is_removed_too(self):
        scene = (
            make_job().rules(default="RestartJob").training().node_falls_silent(1).failed(0).step_through_deletion(1)
        )
        assert scene.status.attempt == 2
        assert forced(scene.after(59).step()) == []
        assert ("digits-worker-1", 0) in forced(scene.after(1).step())

    def test_a_pod_of_a_suspended_job_is_removed_too(self):
        scene = make_job().training().node_falls_silent(1).spec(suspend=True).step_through_deletion(1)
        scene.after(60).step()
        assert scene.seen().status.state is JobState.SUSPENDED

    def test_a_node_that_reports_again_ends_it(self):
        scene = make_job().training().node_falls_silent(1).seen().after(20)
        scene.change(1, ready=True, silent_since=None).reports(11).seen()
        assert scene.says("Restarting") == ("False", "Recovered")
        assert scene.status.state is JobState.TRAINING

    @pytest.mark.parametrize("kind", ["model", "servers", "script"])
    def test_after_an_hour_without_the_node_the_job_trains_again(self, kind):
        """Found silent, deleted, removed by force, without a node for an hour: nothing fails, nothing is restarted, and then it trains."""
        scene = make_job().run_policy(backoffLimit=0, startupDeadlineSeconds=600, progressDeadlineSeconds=300)
        scene = (scene.servers(1) if kind == "servers" else scene.script() if kind == "script" else scene).training()
        scene.after(5).reports(11, samples_per_second=64.0).seen()
        scene.node_falls_silent(1).seen()
        scene.after(30).change(1, deleting=True, deletion_deadline=scene.now + timedelta(seconds=30))
        scene.change(1, disruption="DeletionByTaintManager").reports(11).seen().after(30).reports(11).seen()
        without = {"phase": Phase.PENDING, "reason": "Unschedulable", "message": "0/3 nodes are available"}
        scene.change(1, **without)
        for _ in range(360):
            scene.after(10).reports(11, waiting_for="worker-1 (9 s)", samples_per_second=64.0).seen()
            assert scene.status.state is JobState.RESTARTING
        assert scene.says("Scheduled") == ("False", "Unschedulable")
        assert scene.says("Restarting") == ("True", "NodeLost")
        assert scene.says("Progressing") == ("False", "NoStep")
        assert (scene.status.training.samples_per_second, scene.status.training.eta_seconds) == (None, None)
        assert scene.status.attempt == 1
        scene.change(1, reason="", message="").all_run().reports(11).seen().after(5).reports(
            12, samples_per_second=64.0
        ).seen()
        assert scene.status.state is JobState.TRAINING
        assert scene.status.training.samples_per_second == 64
        assert scene.status.restarts is None or scene.status.restarts.counted_towards_limit == 0


@pytest.mark.parametrize(
    ("disruption", "reason"),
    [
        ("DeletionByTaintManager", "NodeLost"),
        ("DeletionByPodGC", "NodeLost"),
        ("PreemptionByScheduler", "Preempted"),
        ("EvictionByEvictionAPI", "Evicted"),
        ("TerminationByKubelet", "Evicted"),
    ],
)
@pytest.mark.parametrize("ends", ["is deleted", "fails"])
def test_who_took_a_pod_away_is_named(disruption, reason, ends):
    scene = make_job().training()
    marked = {"conditions": frozenset({"DisruptionTarget"}), "disruption": disruption}
    if ends == "fails":
        scene.failed(1, code=143, **marked)
    else:
        scene.change(1, deleting=True, **marked)
    scene.step()
    assert scene.says("Restarting") == ("True", reason)
