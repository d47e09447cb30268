"""The account of failures: what counts towards the limit, what sets it back, and how long a replacement waits."""

from datetime import timedelta

import pytest

from disttrain.api.reasons import JobState
from disttrain.plan.disruptions import delay
from unit.plan.builders import created, deleted, make_job


def test_a_failure_that_is_not_counted_waits_the_shortest_time():
    scene = make_job().training()
    for _ in range(5):
        scene.failed(0).seen().after(300).seen().all_run().seen()
    scene.failed(0, code=143, conditions=frozenset({"DisruptionTarget"})).seen().after(1)
    assert deleted(scene.step()) == ["digits-worker-0"]


@pytest.mark.parametrize(
    ("counted", "seconds"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 128), (9, 256), (10, 300), (1000, 300)]
)
def test_the_back_off_doubles_up_to_five_minutes(counted, seconds):
    assert delay(counted) == timedelta(seconds=seconds)


def test_the_back_off_is_measured_from_the_end_of_the_pod_which_stays_that_long():
    scene = make_job().training()
    for failure, wait in enumerate((1, 2, 4, 8), start=1):
        scene.failed(0).seen()
        assert scene.status.restarts.counted_towards_limit == failure
        scene.after(wait - 0.5)
        assert deleted(scene.step()) == []
        scene.after(0.5)
        assert deleted(scene.step()) == ["digits-worker-0"]
        scene.seen().all_run().seen()


def test_a_checkpoint_sets_the_count_back():
    scene = make_job().training()
    scene.failed(0).seen().after(1).seen().all_run().seen()
    assert scene.status.restarts.counted_towards_limit == 1
    scene.after(5).reports(20, last_checkpoint={"step": 20, "time": scene.now}).seen()
    assert scene.status.restarts.counted_towards_limit == 0
    scene.failed(0).seen()
    assert scene.status.restarts.counted_towards_limit == 1
    assert scene.status.restarts.checkpoint_step == 20
    assert scene.status.restarts.total == 2


def test_no_checkpoint_sets_it_back_when_the_policy_says_never():
    scene = make_job().run_policy(backoffLimitReset="Never").training()
    scene.failed(0).seen().after(1).seen().all_run().seen()
    scene.after(5).reports(20, last_checkpoint={"step": 20, "time": scene.now}).seen()
    assert scene.status.restarts.counted_towards_limit == 1


def test_a_checkpoint_of_a_training_that_starts_from_scratch_resets_the_budget() -> None:
    scene = make_job().run_policy(backoffLimit=2).training()
    scene.after(5).reports(1000, total=5000, last_checkpoint={"step": 1000, "time": scene.now}).seen()
    scene.failed(0).seen().after(1).seen().all_run().seen()
    scene.spec(suspend=True).seen().spec(suspend=False).seen().all_run().seen()
    for number in range(1, 5):
        step = 100 * number
        scene.after(300).reports(step, total=5000, last_checkpoint={"step": step, "time": scene.now}).seen()
        scene.failed(0).seen().after(300).seen().all_run().seen()
    assert not scene.finished


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_job_fails_with_one_failure_more_than_the_limit(limit):
    scene = make_job().run_policy(backoffLimit=limit).training()
    for _ in range(limit):
        scene.failed(0).seen()
        assert scene.status.state is JobState.RESTARTING
        scene.after(300).seen().all_run().seen()
    scene.failed(0).seen()
    assert scene.says("Failed") == ("True", "BackoffLimitExceeded")
    assert "digits-worker-0 failed (OOMKilled, exit code 137)" in scene.condition("Failed").message
    assert scene.status.restarts is None or scene.status.restarts.total == limit


class TestClockAhead:
    """A node's clock that is ahead. Nothing waits for it."""

    @pytest.mark.parametrize("ahead", [2, 300, 3600])
    def test_a_failed_pod_is_replaced_after_its_back_off(self, ahead):
        scene = make_job().training().failed(0, ago=-ahead)
        scene.seen()
        assert scene.status.restarts.last.time == scene.now
        assert "digits-worker-0" in scene.pods
        scene.after(1)
        assert deleted(scene.step()) == ["digits-worker-0"]

    def test_the_back_off_is_the_whole_one(self):
        scene = make_job().run_policy(backoffLimitReset="Never").training()
        for _ in range(3):
            scene.failed(0).seen().after(300).seen().all_run().seen()
        scene.failed(0, ago=-3600).seen()
        assert deleted(scene.after(7).step()) == []
        assert deleted(scene.after(1).step()) == ["digits-worker-0"]

    @pytest.mark.parametrize("ahead", [2, 3600])
    def test_a_restarted_job_is_made_again_after_its_back_off(self, ahead):
        scene = make_job().rules(default="RestartJob").training().failed(0, ago=-ahead).seen()
        assert created(scene.after(0.5).step()) == []
        assert len(created(scene.after(0.5).step())) == 3

    def test_the_judgement_over_a_command_does_not_wait_for_it(self):
        scene = make_job().command().started().failed(0, code=134, ago=-3600)
        for _ in range(5):
            scene.after(1).step()
        assert scene.status.attempt == 2

    @pytest.mark.parametrize("ahead", [2, 3600])
    def test_consequences_of_it_are_not_counted(self, ahead):
        scene = make_job().training()
        for _ in range(3):
            scene.failed(0).seen().after(300).seen().all_run().seen()
        scene.failed(0, ago=-ahead).seen().after(4).failed(1, code=134, ago=1).seen()
        assert scene.status.restarts.counted_towards_limit == 4
