"""What remains of a finished job: its pods by cleanPodPolicy, the job until its TTL is over, and a status that is final."""

from datetime import timedelta

import pytest

from disttrain.plan.model import CreatePod, DeleteJob, Phase
from unit.plan.builders import deleted, make_job


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


@pytest.mark.parametrize("policy", ["Running", "All", "None"])
def test_a_pod_that_was_created_after_the_end_is_deleted_by_every_policy(policy):
    """By the late request of an operator that had lost its Lease."""
    scene = make_job().run_policy(cleanPodPolicy=policy).training().succeeded(0, 1, ago=30)
    scene.step()
    scene.after(5).change(1, phase=Phase.RUNNING, ready=True, exit_code=None, created=scene.now)
    assert "digits-worker-1" in deleted(scene.step())


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
