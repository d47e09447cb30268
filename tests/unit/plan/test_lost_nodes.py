"""Pods whose node is gone: deleted without its word, but only when they were told to end long ago."""

from datetime import timedelta

import pytest

from disttrain.plan.model import DeletePod, Phase
from unit.plan.builders import WORKER, created, make_job


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
        pytest.param({"deleting": False}, id="a pod that nobody told to end"),
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
