"""network.tls Mutual: a Secret with a random name, before the first pods, one an attempt, and gone with it."""

from __future__ import annotations

from disttrain.api.reasons import JobState
from disttrain.plan.model import CreateSecret, DeleteSecret, Refusal, Write
from unit.plan.builders import MASTER, Scene, created, make_job


def mutual() -> Scene:
    return make_job().spec(network={"tls": "Mutual"})


def begun() -> Scene:
    """With its pods."""
    scene = mutual()
    for _ in range(5):
        scene.step()
    assert len(scene.pods) == 3
    return scene


def test_name_is_stored_then_the_secret_is_created_then_its_uid_is_stored_and_only_then_there_are_pods() -> None:
    scene = mutual()
    first = scene.step()
    assert (first.write, scene.certificate.uid, created(first)) == (Write.NOW, None, [])
    assert CreateSecret() not in first.actions, "its name is not stored yet"
    assert scene.step().actions == (CreateSecret(),)
    assert scene.step().actions == ()
    assert (scene.certificate.uid, scene.certificate.public_key) == (scene.secrets[scene.certificate.suffix], "AA==")
    assert len(created(scene.step())) == 3


def test_event_that_pods_are_created_comes_once() -> None:
    scene = mutual()
    events = [event.reason for _ in range(6) for event in scene.step().events]
    assert events == ["Created"]


def test_operator_that_was_lost_before_it_stored_the_uid_leaves_no_secret_behind_and_no_pod_with_another_one() -> None:
    scene = mutual()
    scene.step()
    scene.step()
    orphan = scene.certificate.suffix
    scene.new_operator()
    for _ in range(8):
        scene.step()
    assert orphan not in scene.secrets
    assert list(scene.secrets) == [scene.certificate.suffix]
    assert len(scene.pods) == 3


def test_secret_that_another_client_creates_under_the_name_is_not_used() -> None:
    scene = mutual()
    scene.step()
    foreign = scene.certificate.suffix
    scene.secrets[foreign] = "foreign"
    for _ in range(8):
        scene.step()
    assert scene.certificate.suffix != foreign
    assert list(scene.secrets) == [scene.certificate.suffix]


def test_secret_that_a_user_deleted_is_not_created_again_in_the_attempt_by_this_or_another_operator() -> None:
    scene = begun().all_run()
    scene.seen()
    scene.secrets.clear()
    for _ in range(2):
        scene.gone(1)
        scene.new_operator()
        plans = [scene.step() for _ in range(4)]
        assert not [action for plan in plans for action in plan.actions if isinstance(action, CreateSecret)]
    assert scene.secrets == {}


def test_next_attempt_has_another_secret_and_that_of_the_attempt_before_is_deleted_first() -> None:
    scene = begun()
    before = scene.certificate
    scene.status = scene.status.model_copy(update={"attempt": 2})
    scene.pods.clear()
    assert scene.step().actions == (DeleteSecret(),)
    assert (scene.certificate.attempt, scene.certificate.uid) == (2, None)
    for _ in range(3):
        scene.step()
    assert list(scene.secrets) == [scene.certificate.suffix] != [before.suffix]


def test_attempt_that_is_suspended_before_it_has_a_secret_leaves_none_of_the_attempt_before() -> None:
    scene = begun()
    scene.status = scene.status.model_copy(update={"attempt": 2})
    scene.pods.clear()
    scene.spec(suspend=True)
    assert DeleteSecret() in scene.step().actions
    assert (scene.secrets, scene.status.certificate) == ({}, None)
    assert scene.step().actions == ()


def test_attempt_that_is_suspended_between_two_steps_of_its_certificate_leaves_no_secret() -> None:
    for steps in (1, 2, 3):
        scene = mutual()
        for _ in range(steps):
            scene.step()
        scene.spec(suspend=True)
        for _ in range(3):
            scene.step()
        assert (scene.secrets, scene.status.certificate) == ({}, None), steps


def test_end_of_the_job_deletes_the_secret_and_forgets_it() -> None:
    scene = begun().all_run()
    scene.seen()
    scene.succeeded(0, 1).succeeded(0, role=MASTER)
    for _ in range(4):
        scene.step()
    assert (scene.status.state, scene.secrets, scene.status.certificate) == (JobState.COMPLETE, {}, None)
    assert DeleteSecret() not in scene.step().actions


def test_no_name_is_drawn_while_the_job_cannot_be_made() -> None:
    scene = mutual()
    scene.refusals = (Refusal(name="Service digits", message="quota", retryable=True, time=scene.now),)
    scene.step()
    assert scene.status.certificate is None


def test_job_without_tls_has_no_secret() -> None:
    scene = make_job()
    assert len(created(scene.step())) == 3
    assert scene.status.certificate is None
