"""What a job is made of: what is missing is created, what is old is deleted, and what was refused is tried again later."""

from dataclasses import replace
from datetime import timedelta

from disttrain.api.names import ChildKind
from disttrain.api.reasons import JobState, Reason
from disttrain.plan.model import Create, Delete, Refusal
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


def test_network_policy_goes_when_the_spec_wants_none():
    scene = make_job().training().spec(network={"policy": "None"})
    assert scene.step().actions == (Delete(kind=ChildKind.NETWORK_POLICY),)
    assert scene.step().actions == ()
    assert Create(kind=ChildKind.NETWORK_POLICY) in scene.spec(network={"policy": "JobOnly"}).step().actions


def test_a_service_or_policy_that_a_user_deleted_is_created_again():
    scene = make_job().training()
    scene.children = frozenset()
    assert scene.step().actions == (Create(kind=ChildKind.SERVICE), Create(kind=ChildKind.NETWORK_POLICY))
    assert scene.status.state is JobState.TRAINING


def test_a_refusal_that_may_pass_is_tried_again_later():
    scene = make_job()
    scene.step()
    scene.gone(1)
    scene.refusals = (Refusal(name="digits-worker-1", message="exceeded quota: gpus", retryable=True, time=scene.now),)
    assert created(scene.step()) == []
    assert scene.says("Scheduled") == ("False", "PodRefused")
    assert scene.condition("Scheduled").message == "digits-worker-1: exceeded quota: gpus"
    scene.after(10)
    assert len(created(scene.step())) == 1


def test_a_pod_that_is_called_wrong_is_tried_again_seldom():
    """A policy of admission says 422 as the schema does, and an administrator may lift it."""
    scene = make_job()
    refusal = Refusal(name="digits-master-0", message="spec.nodeSelector: Invalid", retryable=False, time=scene.now)
    scene.refusals = (refusal,)
    plan = scene.step()
    assert (created(plan), plan.look_again) == ([], timedelta(seconds=60))
    assert scene.says("Valid") == ("False", "PodRefused")
    assert "digits-master-0 could not be created: spec.nodeSelector" in scene.condition("Valid").message
    assert scene.status.state is JobState.PENDING
    assert created(scene.after(59).plan()) == []
    before = scene.status
    plan = scene.after(1).plan()
    assert (MASTER, 0) in created(plan)
    assert plan.status.state is JobState.PENDING, "nothing is said to be made before it is"
    assert plan.status.conditions == before.conditions
    scene.refusals = (replace(refusal, time=scene.now),)
    assert created(scene.plan()) == []
    scene.refusals = ()
    assert len(created(scene.step())) == 3
    assert scene.says("Valid") == ("True", "Accepted")


def test_a_name_that_another_object_has_is_reported_and_nothing_is_created():
    scene = make_job()
    scene.name_conflicts = ("digits",)
    plan = scene.step()
    assert created(plan) == []
    assert scene.says("Valid") == ("False", "NameTaken")
    assert plan.look_again is not None
    scene.name_conflicts = ()
    assert len(created(scene.step())) == 3


def test_what_a_deleted_job_of_the_same_name_left_is_waited_for_and_no_mistake():
    scene = make_job()
    scene.former = ("digits-master-0", "digits-worker-1")
    plan = scene.step()
    assert created(plan) == []
    assert scene.says("Valid") == ("True", "Accepted")
    assert scene.says("Scheduled") == ("False", "FormerJobEnds")
    message = "Waiting until the objects of a deleted job of this name are gone: digits-master-0, digits-worker-1"
    assert scene.condition("Scheduled").message == message
    assert scene.status.state is JobState.PENDING
    assert plan.look_again is not None
    scene.former = ()
    assert len(created(scene.step())) == 3
    assert scene.status.disruptions is None


def test_pods_of_an_older_attempt_are_deleted_and_never_counted():
    scene = make_job().rules(default="RestartJob").training().failed(0)
    scene.step()
    scene.failed(1, code=1)
    assert len(deleted(scene.step())) == 3
    assert scene.status.restarts.total == 1
    assert not scene.status.is_true("Failed")


def test_a_deleting_pod_blocks_its_successor():
    scene = make_job().training().change(1, deleting=True)
    assert created(scene.step()) == []
    scene.gone(1)
    assert created(scene.step()) == [(WORKER, 1)]


def test_a_pod_that_a_user_deleted_is_created_again_without_counting():
    scene = make_job().training().gone(1)
    plan = scene.step()
    assert created(plan) == [(WORKER, 1)]
    assert scene.status.restarts is None
    assert scene.says("Restarting") == ("True", "Replaced")
    assert [(event.reason, event.warning) for event in plan.events] == [("Replaced", False)]


def test_a_worker_that_comes_again_finds_a_master():
    scene = make_job().training().succeeded(0).succeeded(0, role=MASTER).failed(1).seen().after(1)
    assert "digits-worker-1" in deleted(scene.step())
    scene.seen()
    assert scene.pod(0, MASTER).uid != "uid-1"
    assert not scene.pod(0, MASTER).done


def test_programs_of_two_attempts_of_a_command_never_live_at_once() -> None:
    scene = make_job().command().started().after(10).failed(0).after(3)
    scene.step()
    assert scene.status.attempt == 2
    old = scene.pod(1)
    scene.step()
    # It has its grace period, in which nothing in its program refuses a peer of another attempt.
    scene.pods[old.name] = replace(old, deleting=True)
    scene.after(2)
    assert created(scene.plan()) == []
    scene.gone(1)
    assert len(created(scene.plan())) == 3
