"""decide: the same snapshot gives the same plan, and what has not changed changes nothing. Not here: the policies."""

import pytest

from disttrain.plan import decide
from unit.plan.builders import SERVER, make_job


def test_a_pass_over_an_unchanged_job_changes_nothing():
    scene = make_job().servers(1).training().after(3)
    plan = scene.plan()
    assert plan.status == scene.status
    assert plan.actions == ()
    assert plan.events == ()


@pytest.mark.parametrize(
    "scene",
    [
        pytest.param(make_job().spec(managedBy="kueue.x-k8s.io/multikueue"), id="a job of another controller"),
        pytest.param(make_job().metadata(deletionTimestamp="2026-01-01T00:00:00Z"), id="a job that is being deleted"),
    ],
)
def test_a_job_of_another_controller_or_that_is_being_deleted_is_left_alone(scene):
    plan = scene.plan()
    assert (plan.actions, plan.status, plan.events, plan.look_again) == ((), scene.status, (), None)


def test_decide_is_a_function():
    scene = make_job().servers(2).training().failed(0).failed(1, SERVER)
    assert decide(scene.snapshot) == decide(scene.snapshot)
