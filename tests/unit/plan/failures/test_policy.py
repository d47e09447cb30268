"""Failed pods: what follows, which one is to blame, and that each is counted once."""

from datetime import timedelta

import pytest

from disttrain.api import Termination
from disttrain.api.reasons import JobState, Reason
from disttrain.plan.model import Phase
from unit.plan.builders import MASTER, SERVER, WORKER, created, deleted, make_job, words

FAIL = {"action": "FailJob"}
REPLICA = {"action": "RestartReplica"}
JOB = {"action": "RestartJob"}


def test_a_failure_is_written_down_before_its_pod_is_touched():
    scene = make_job().training().failed(1)
    recorded = scene.step()
    assert recorded.actions == ()
    assert recorded.look_again == timedelta(0)
    assert scene.status.restarts.total == 1
    assert scene.status.restarts.counted_towards_limit == 1
    assert scene.status.restarts.accounted == (scene.pod(1).uid,)
    assert scene.status.state is JobState.RESTARTING
    scene.after(1)
    assert deleted(scene.step()) == ["digits-worker-1"]
    assert created(scene.step()) == [(WORKER, 1)]
    assert scene.status.restarts.accounted == ()
    scene.all_run().seen()
    assert scene.says("Restarting") == ("False", "Recovered")
    assert scene.status.restarts.total == 1


def test_a_crash_after_the_write_neither_loses_nor_doubles_the_count():
    scene = make_job().training().failed(1)
    scene.step()
    for _ in range(3):
        scene.step()
    assert scene.status.restarts.total == 1


def test_the_message_names_the_pod_its_end_its_termination_message_and_its_log():
    scene = make_job().training()
    scene.failed(1, code=134, termination=words("CUDA error: unspecified launch failure", "train.py:12"))
    plan = scene.step()
    expected = (
        "Pod digits-worker-1 failed (exit code 134): CUDA error: unspecified launch failure (train.py:12); "
        "log: kubectl logs -n team digits-worker-1"
    )
    assert scene.condition("Restarting").message == expected
    assert [(event.reason, event.message, event.warning) for event in plan.events] == [
        ("ReplicaFailed", expected, True)
    ]


def test_out_of_memory_names_the_limit():
    limited = {"spec": {"containers": [{"name": "trainer", "resources": {"limits": {"memory": "4Gi"}}}]}}
    scene = make_job().spec(worker={"template": limited}).training().failed(0, code=137, reason="OOMKilled")
    scene.step()
    assert "(OOMKilled, exit code 137, memory limit 4Gi)" in scene.condition("Restarting").message


@pytest.mark.parametrize("code", [1, 2, 126, 127])
def test_by_default_the_users_error_fails_the_job_at_once(code):
    scene = make_job().training().failed(0, code=code, termination=words("ModuleNotFoundError: No module named 'mine'"))
    scene.step()
    assert scene.says("Failed") == ("True", "UserCodeFailed" if code == 1 else "FailurePolicy")
    assert scene.status.state is JobState.FAILED
    assert "No module named 'mine'" in scene.condition("Failed").message
    assert "rule bad-code" in scene.condition("Failed").message


def test_a_loss_that_is_not_finite_is_named():
    scene = make_job().training().reports(11, nan_loss="rank 1, step 11").failed(1, code=1)
    scene.step()
    assert scene.says("Failed") == ("True", "NaNLoss")
    assert "rank 1, step 11" in scene.condition("Failed").message


@pytest.mark.parametrize(
    ("rules", "pod", "outcome"),
    [
        pytest.param([], {"code": 1}, "replica", id="no rule matches: the default action"),
        pytest.param([{"name": "a", "onExitCodes": [9], **FAIL}], {"code": 1}, "replica", id="another exit code"),
        pytest.param([{"name": "a", "onExitCodes": [9], **JOB}], {"code": 9}, "job", id="a rule restarts the job"),
        pytest.param(
            [{"name": "a", "onExitCodes": [9], **JOB}, {"name": "b", "onExitCodes": [9], **FAIL}],
            {"code": 9},
            "job",
            id="the first rule wins",
        ),
        pytest.param(
            [{"name": "a", "onExitCodes": [9], "onPodConditions": ["X"], **FAIL}],
            {"code": 9},
            "replica",
            id="both parts of a rule must hold",
        ),
        pytest.param(
            [{"name": "a", "onExitCodes": [9], "onPodConditions": ["X"], **FAIL}],
            {"code": 9, "conditions": frozenset({"X"})},
            "failed",
            id="both parts of a rule hold",
        ),
        pytest.param(
            [{"name": "a", "onPodConditions": ["X"], **FAIL}],
            {"code": None, "conditions": frozenset({"X"})},
            "failed",
            id="by condition",
        ),
    ],
)
def test_failure_rules(rules, pod, outcome):
    scene = make_job().rules(*rules).training().failed(0, **pod)
    scene.step()
    actual = "failed" if scene.status.is_true("Failed") else "job" if scene.status.attempt == 2 else "replica"
    assert actual == outcome


@pytest.mark.parametrize("role", [MASTER, SERVER, WORKER])
def test_a_preempted_pod_is_replaced_without_counting(role):
    scene = make_job().servers(1).run_policy(backoffLimit=0).training()
    scene.failed(0, role=role, code=143, conditions=frozenset({"DisruptionTarget"})).seen()
    assert scene.says("Restarting") == ("True", "Preempted")
    assert not scene.finished
    assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (1, 0)


def test_a_lost_peer_is_never_the_root_cause():
    scene = make_job().workers(3).training().failed(0, code=75, ago=2).failed(1, code=137, ago=1).failed(2, code=75)
    scene.step()
    assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (3, 1)
    assert (scene.status.restarts.last.index, scene.status.restarts.last.reason) == (1, "OOMKilled")
    assert scene.condition("Restarting").message.endswith("(and 2 more after it)")


def test_lost_peers_alone_are_replaced_without_counting():
    scene = make_job().run_policy(backoffLimit=0).training().failed(0, code=75).failed(1, code=75)
    scene.step()
    assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (2, 0)


class TestLostPeersAgainAndAgain:
    """Exit code 75 with no pod that was lost: once it counts as no failure, but it must not go on without end."""

    def lost(self, scene, *ranks):
        """Some workers lose their peers, are replaced, and all meet again without a step."""
        for rank in ranks:
            scene.failed(rank, code=75)
        scene.seen()
        return scene.after(5).seen().all_run().reports(10).seen()

    def test_it_counts_when_no_step_was_made_since_the_last_time(self):
        scene = make_job().training()
        self.lost(scene.after(5), 0, 1)
        assert scene.status.restarts.counted_towards_limit == 0
        self.lost(scene.after(5), 0, 1)
        assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (4, 1)
        assert "this is the second time in a row, with no step between the two" in scene.condition("Restarting").message

    def test_it_ends_by_the_limit(self):
        scene = make_job().run_policy(backoffLimit=3).training()
        rounds = 0
        while not scene.finished:
            self.lost(scene.after(300), 0, 1)
            rounds += 1
            assert rounds < 10
        assert scene.says("Failed") == ("True", "BackoffLimitExceeded")
        assert rounds == 5, "one for nothing, three that count, and one too many"

    def test_a_step_in_between_makes_it_a_consequence_again(self):
        scene = make_job().training()
        for step in range(11, 20):
            self.lost(scene.after(5), 0, 1).after(5).reports(step).seen()
            scene.reports(10 if step == 19 else step)
        assert scene.status.restarts.counted_towards_limit == 0

    def test_a_step_that_is_reported_only_with_the_failure_is_a_step(self):
        scene = make_job().training()
        self.lost(scene.after(5), 0)
        self.lost(scene.reports(11), 0)
        assert scene.status.restarts.counted_towards_limit == 0

    def test_a_fall_back_to_a_checkpoint_is_no_step(self):
        scene = make_job().training()
        self.lost(scene.after(5).reports(20).seen().after(5), 0)
        assert scene.status.training.step == 10
        self.lost(scene.after(5), 0)
        assert scene.status.restarts.counted_towards_limit == 1

    def test_peers_that_notice_one_loss_one_after_the_other_are_one_loss(self):
        scene = make_job().workers(8).run_policy(backoffLimit=1).training()
        for rank in range(8):
            scene.after(2).failed(rank, code=75).seen()
        assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (8, 0)

    def test_workers_that_fail_in_turn_do_not_hide_one_another(self):
        scene = make_job().run_policy(backoffLimit=3).training()
        for turn in range(20):
            if not scene.finished:
                self.lost(scene, turn % 2)
        assert scene.says("Failed") == ("True", "BackoffLimitExceeded")

    def test_waiting_for_a_peer_without_a_node_is_no_failure(self):
        scene = make_job().run_policy(backoffLimit=0, startupDeadlineSeconds=86400).seen()
        for _ in range(20):
            scene.all_run().change(1, phase=Phase.PENDING, ready=False, scheduled=False).seen()
            scene.after(600).failed(0, code=75).seen()
            scene.after(5).seen()
        assert not scene.finished

    def test_a_rule_that_says_so_keeps_it_from_counting(self):
        rule = {"name": "peers", "onExitCodes": [75], **REPLICA, "countTowardsLimit": False}
        scene = make_job().rules(rule).training()
        for _ in range(5):
            self.lost(scene, 0)
        assert scene.status.restarts.counted_towards_limit == 0


def test_what_fails_after_the_root_cause_is_its_consequence_also_when_it_is_seen_later():
    scene = make_job().workers(3).training().failed(0)
    scene.step()
    scene.after(0.5).failed(1, code=1).step()
    assert not scene.status.is_true("Failed")
    assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (2, 1)
    assert scene.status.restarts.last.index == 0


def test_consequences_cannot_hide_one_another_from_the_limit():
    scene = make_job().run_policy(backoffLimit=3, backoffLimitReset="Never").training()
    for _ in range(60):
        for rank in (0, 1):
            if f"digits-worker-{rank}" in scene.pods and not scene.pod(rank).done:
                scene.all_run().failed(rank, code=134).seen()
                break
        scene.after(0.7).seen()
    assert scene.says("Failed") == ("True", "BackoffLimitExceeded")


def test_of_two_pods_that_ended_in_one_second_the_signal_is_the_cause():
    scene = make_job().training().failed(0, code=1).failed(1, code=137)
    scene.step()
    assert not scene.status.is_true("Failed")
    assert scene.status.restarts.last.index == 1


def test_a_restart_of_the_job_is_written_down_then_pods_are_deleted_then_made():
    scene = make_job().rules(default="RestartJob").training().failed(0)
    recorded = scene.step()
    assert (recorded.actions, recorded.status.attempt, recorded.status.restarts.total) == ((), 2, 1)
    assert sorted(deleted(scene.step())) == ["digits-master-0", "digits-worker-0", "digits-worker-1"]
    assert created(scene.step()) == [], "the back-off is not over"
    scene.after(1)
    plan = scene.step()
    assert created(plan) == [(MASTER, 0), (WORKER, 0), (WORKER, 1)]
    assert {pod.attempt for pod in scene.pods.values()} == {2}


def test_a_restart_that_does_not_count_waits_too():
    rule = {"name": "preempted", "onExitCodes": [143], **JOB, "countTowardsLimit": False}
    scene = make_job().rules(rule).training().failed(0, code=143).seen()
    assert (scene.status.attempt, scene.status.restarts.counted_towards_limit) == (2, 0)
    assert created(scene.after(0.5).step()) == []
    assert len(created(scene.after(0.5).step())) == 3


def test_a_pod_that_is_asked_to_end_does_not_fail():
    scene = make_job().training().change(1, deleting=True).failed(1, code=143)
    plan = scene.step()
    assert plan.actions == ()
    assert scene.status.restarts is None


class TestCommand:
    """No agent of ours in the pod: the loss of one worker is the loss of all."""

    def test_the_judgement_waits_until_the_first_failure_shows(self):
        scene = make_job().command().started().failed(0, code=1)
        assert scene.step().look_again == timedelta(seconds=3)
        assert not scene.status.is_true("Failed")
        scene.after(1).failed(1, code=137, ago=2).after(2).step()
        assert scene.status.attempt == 2
        assert scene.status.restarts.last.index == 1

    def test_every_failure_restarts_the_job(self):
        scene = make_job().command().started().failed(0, code=134, ago=3)
        scene.step()
        assert (scene.status.attempt, scene.status.restarts.counted_towards_limit) == (2, 1)

    def test_the_users_error_still_fails_the_job(self):
        scene = make_job().command().started().failed(0, code=1, ago=4).failed(1, code=2, ago=3)
        scene.step()
        assert scene.says("Failed") == ("True", "UserCodeFailed")

    def test_75_is_an_exit_code_like_any_other(self):
        scene = make_job().command().started().failed(0, code=75, ago=3)
        scene.step()
        assert scene.status.restarts.counted_towards_limit == 1

    def test_a_deleted_worker_restarts_the_job_without_counting(self):
        scene = make_job().command().started().gone(1).failed(0, code=1)
        scene.step()
        assert scene.status.attempt == 2
        assert scene.says("Restarting") == ("True", Reason.REPLACED)
        assert scene.status.restarts.total == 0


def test_a_failed_server_is_replaced_alone():
    scene = make_job().servers(2).training().failed(1, SERVER).seen().after(1)
    assert deleted(scene.step()) == ["digits-ps-1"]
    assert {status.role: status.restarts for status in scene.status.replica_statuses} == {
        "Master": 0,
        "ParameterServer": 1,
        "Worker": 0,
    }


def test_a_termination_message_is_cut():
    scene = make_job().training().failed(0, termination=Termination(message="x" * 5000))
    scene.step()
    assert len(scene.status.restarts.last.message) == 1024
