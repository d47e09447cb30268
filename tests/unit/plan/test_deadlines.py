"""Startup, progress, active: when their clocks run, when they do not, and what follows."""

from datetime import timedelta

import pytest

from disttrain.api.reasons import JobState
from disttrain.plan.model import Phase
from unit.plan.builders import MASTER, NOON, make_job


def test_a_job_that_is_not_ready_in_time_fails_and_says_what_it_waited_for():
    scene = make_job().run_policy(startupDeadlineSeconds=60)
    scene.seen().all_run()
    scene.change(
        1, ready=False, phase="Pending", reason="ImagePullBackOff", message='Back-off pulling image "nope:1"'
    ).seen()
    scene.after(59).step()
    assert scene.status.completion_time is None
    scene.after(1).step()
    assert scene.says("Failed") == ("True", "StartupDeadlineExceeded")
    assert 'digits-worker-1: Back-off pulling image "nope:1"' in scene.condition("Failed").message


def test_a_master_that_cannot_be_read_does_not_use_the_startup_deadline_up():
    scene = make_job().run_policy(startupDeadlineSeconds=30).started()
    for _ in range(30):
        scene.after(5).step()
    assert scene.says("Ready") == ("True", "AllPodsReady")


def test_the_startup_clock_runs_on_through_restarts_of_pods_that_never_meet():
    scene = make_job().run_policy(startupDeadlineSeconds=600).seen()
    for _ in range(10):
        scene.all_run().reports(0, last_update_time=None, waiting_for="worker-1 (9 s)").seen()
        scene.after(100).failed(0, code=75).failed(1, code=75).seen().after(1).seen()
    assert scene.says("Failed") == ("True", "StartupDeadlineExceeded")
    assert scene.status.completion_time - NOON <= timedelta(seconds=700)


def test_the_clock_of_recovery_stands_while_the_others_make_steps():
    scene = make_job().servers(1).run_policy(recoveryDeadlineSeconds=60).training()
    scene.gone(1).seen()
    for step in range(20):
        scene.after(10).reports(20 + step).seen()
    assert not scene.status.is_true("Failed")
    assert scene.status.state is JobState.RESTARTING
    scene.after(60).step()
    assert scene.says("Failed") == ("True", "RecoveryDeadlineExceeded")
    assert "within 60 s (runPolicy.recoveryDeadlineSeconds)" in scene.condition("Failed").message


def test_a_stall_is_shown_then_the_job_is_restarted_and_counted_once():
    scene = make_job().run_policy(progressDeadlineSeconds=60).training()
    scene.after(59).step()
    assert scene.status.state is JobState.TRAINING
    scene.after(1).reports(10, last_update_time=scene.now, waiting_for="worker-1 (59 s)")
    plan = scene.step()
    assert scene.status.state is JobState.STALLED
    assert [event.reason for event in plan.events] == ["Stalled"]
    assert plan.look_again == timedelta(0)
    message = "No step for 60 s (runPolicy.progressDeadlineSeconds), the last was 10. Waiting for worker-1"
    assert scene.condition("Progressing").message == message
    scene.step()
    assert scene.status.attempt == 2
    assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (1, 1)
    assert scene.status.restarts.last.reason == "Stalled"
    assert scene.says("Restarting") == ("True", "Stalled")
    scene.seen()
    assert scene.status.attempt == 2


def test_a_stall_beyond_the_limit_fails_the_job():
    scene = make_job().run_policy(progressDeadlineSeconds=60, backoffLimit=0).training().after(60)
    scene.reports(10).seen()
    assert scene.says("Failed") == ("True", "BackoffLimitExceeded")
    assert "No step for 60 s" in scene.condition("Failed").message


def test_a_step_in_time_moves_the_deadline():
    scene = make_job().run_policy(progressDeadlineSeconds=60).training()
    for step in range(11, 30):
        scene.after(50).reports(step).seen()
    assert scene.status.state is JobState.TRAINING


def test_the_clock_of_the_master_does_not_matter():
    scene = make_job().run_policy(progressDeadlineSeconds=60).training()
    an_hour_ago = scene.now - timedelta(hours=1)
    for step in range(11, 20):
        scene.after(50).reports(step, last_update_time=an_hour_ago).seen()
    assert scene.status.state is JobState.TRAINING


@pytest.mark.parametrize(
    "scene",
    [
        pytest.param(make_job().script().started(), id="a script of which nothing was read"),
        pytest.param(
            make_job().script().started().reports(0, last_update_time=None).seen(), id="a script that reports no steps"
        ),
        pytest.param(make_job().command().started().reports(0, last_update_time=None).seen(), id="a command"),
        pytest.param(make_job().started(), id="a master that cannot be reached"),
    ],
)
def test_silence_is_no_stall(scene):
    for _ in range(200):
        scene.after(60).step()
        scene.report_read = scene.report and scene.now
    assert scene.status.attempt == 1
    assert scene.says("Progressing") == ("Unknown", "NoReport")


def test_a_master_that_falls_silent_is_no_stall():
    scene = make_job().run_policy(progressDeadlineSeconds=120).training()
    for _ in range(60):
        scene.after(6).step()
    assert scene.status.attempt == 1
    assert scene.says("Progressing") == ("Unknown", "NoReport")


def test_a_script_that_reported_steps_can_stall():
    scene = make_job().script().started().reports(3).seen().after(901).reports(3, last_update_time=NOON)
    scene.seen()
    assert scene.status.attempt == 2


def test_a_job_that_never_makes_its_first_step_stalls():
    scene = make_job().run_policy(progressDeadlineSeconds=60).started().reports(0, last_update_time=None).seen()
    scene.after(61).reports(0, last_update_time=None).seen()
    assert scene.status.attempt == 2


def test_a_new_attempt_has_a_new_progress_clock():
    scene = make_job().run_policy(progressDeadlineSeconds=60).training().after(61).reports(10).seen()
    scene.after(600).seen().all_run().seen()
    scene.reports(10, last_update_time=None).seen().after(30).reports(10, last_update_time=None).seen()
    assert scene.status.attempt == 2


def test_active_deadline():
    scene = make_job().run_policy(activeDeadlineSeconds=100).training().after(99).reports(50)
    scene.step()
    assert scene.status.state is JobState.TRAINING
    assert scene.plan().look_again == timedelta(seconds=1)
    scene.after(1).step()
    assert scene.says("Failed") == ("True", "DeadlineExceeded")
    assert scene.says("Complete") == ("False", "DeadlineExceeded")


def test_active_deadline_does_not_undo_success():
    scene = (
        make_job()
        .run_policy(activeDeadlineSeconds=100)
        .training()
        .succeeded(0, 1)
        .succeeded(0, role=MASTER)
        .after(1000)
    )
    scene.step()
    assert scene.status.is_true("Complete")


def test_pods_that_started_while_the_operator_was_away_are_seen_before_the_startup_deadline() -> None:
    scene = make_job().seen().after(5).all_run()
    scene.after(1900).new_operator().reports(5000).seen()
    assert not scene.finished


def test_what_is_ready_in_the_last_second_before_the_startup_deadline_is_in_time() -> None:
    scene = make_job().run_policy(startupDeadlineSeconds=120).seen()
    assert not scene.after(119).all_run().reports(1).after(1).seen().finished


def test_a_new_operator_reads_the_master_before_it_judges_a_missing_worker() -> None:
    scene = make_job().servers(1).training().gone(1).seen()
    scene.change(1, reason="Unschedulable", message="0/3 nodes").after(1900).new_operator().seen()
    assert not scene.finished


def test_first_steps_that_others_make_between_two_passes_count_against_the_startup_deadline() -> None:
    scene = make_job().servers(1).seen().all_run().gone(1)
    scene.after(1900).new_operator().reports(10).seen()
    assert not scene.finished


class TestRecovery:
    """A job that has trained and lacks a pod: the start-up is long over, and the work that is done is worth the wait."""

    def without_a_node(self, scene, seconds):
        for _ in range(seconds // 60):
            scene.change(
                1, phase=Phase.PENDING, ready=False, scheduled=False, reason="Unschedulable", message="0/3 nodes"
            )
            scene.after(60).reports(10, waiting_for="worker-1 (9 s)").seen()
        return scene

    def test_a_lost_pod_is_waited_for_without_end(self):
        scene = self.without_a_node(make_job().run_policy(startupDeadlineSeconds=60).training(), 86400)
        assert not scene.finished
        assert scene.says("Scheduled") == ("False", "Unschedulable")

    @pytest.mark.parametrize("how", ["a restart of the job", "a resume"])
    def test_a_later_attempt_is_no_start_up(self, how):
        scene = make_job().rules(default="RestartJob").run_policy(startupDeadlineSeconds=60).training()
        if how == "a resume":
            scene.spec(suspend=True).seen().after(60).spec(suspend=False).seen()
        else:
            scene.failed(0).seen().after(1).seen()
        assert scene.status.attempt == 2
        scene.all_run()
        assert not self.without_a_node(scene, 3600).finished

    @pytest.mark.parametrize("scene", [make_job().script(), make_job().command()], ids=["script", "command"])
    def test_of_a_program_that_reports_no_steps_the_start_up_ends_when_all_its_pods_have_run(self, scene):
        scene.run_policy(startupDeadlineSeconds=60).started().after(600).seen()
        scene.change(1, ready=False, silent_since=scene.now)
        for _ in range(60):
            scene.after(60).seen()
        assert not scene.finished
        assert scene.status.state is JobState.RESTARTING

    def test_a_script_that_lost_a_pod_after_a_restart_of_the_job_is_not_starting_up_either(self):
        scene = make_job().script().rules(default="RestartJob").run_policy(startupDeadlineSeconds=60).started()
        scene.after(61).seen().after(600).failed(0).seen().after(1).seen().all_run()
        scene.change(1, phase=Phase.PENDING, ready=False, scheduled=False)
        for _ in range(60):
            scene.after(60).seen()
        assert not scene.finished

    def test_before_the_first_step_the_start_up_deadline_counts(self):
        scene = make_job().run_policy(startupDeadlineSeconds=600).started().reports(0, last_update_time=None).seen()
        scene.gone(1).seen().after(600).reports(0, last_update_time=None).seen()
        assert scene.says("Failed") == ("True", "StartupDeadlineExceeded")

    def test_a_recovery_deadline_ends_the_wait_and_names_what_was_missing(self):
        scene = self.without_a_node(make_job().run_policy(recoveryDeadlineSeconds=600).training(), 600)
        assert not scene.finished
        self.without_a_node(scene, 60)
        assert scene.says("Failed") == ("True", "RecoveryDeadlineExceeded")
        message = scene.condition("Failed").message
        assert "within 600 s (runPolicy.recoveryDeadlineSeconds)" in message
        assert "worker-1" in message

    def test_a_recovery_deadline_says_nothing_about_the_start_up(self):
        scene = make_job().run_policy(recoveryDeadlineSeconds=60, startupDeadlineSeconds=600).seen()
        assert not scene.after(599).seen().finished
        assert scene.after(1).seen().finished

    def test_pods_that_are_all_there_and_do_not_meet_again_are_a_stall(self):
        scene = make_job().run_policy(progressDeadlineSeconds=300).training().gone(1).seen()
        scene.after(3600).reports(10, waiting_for="worker-1 (9 s)").seen().all_run().seen()
        scene.after(299).reports(10, waiting_for="worker-1 (9 s)").seen()
        assert scene.status.attempt == 1
        scene.after(1).reports(10, waiting_for="worker-1 (9 s)").seen()
        assert scene.status.attempt == 2

    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"ready": False, "silent_since": NOON}, id="its node is silent"),
            pytest.param({"ready": False}, id="it is not ready"),
            pytest.param({"ready": False, "phase": Phase.PENDING, "scheduled": False}, id="it has no node"),
            pytest.param({"ready": False, "deleting": True}, id="it ends"),
        ],
    )
    def test_the_progress_deadline_stands_still_while(self, fields):
        scene = make_job().run_policy(progressDeadlineSeconds=60).training().change(1, **fields)
        for _ in range(60):
            scene.after(60).reports(10).seen()
        assert scene.status.attempt == 1
        scene.change(1, silent_since=None, deleting=False).all_run().seen().after(59).reports(10).seen()
        assert scene.status.attempt == 1
        scene.after(1).reports(10).seen()
        assert scene.status.attempt == 2


class TestBlameOfAStall:
    def stalled(self, waiting_for):
        scene = make_job().servers(2).training().after(900).reports(10, waiting_for=waiting_for).seen()
        assert scene.status.attempt == 2
        return scene

    def restarts(self, scene):
        last = scene.status.restarts.last
        by_role = {replicas.role: replicas.restarts for replicas in scene.status.replica_statuses}
        return last.role, last.index, by_role

    @pytest.mark.parametrize(
        ("waiting_for", "role", "index"),
        [("worker-1 (59 s)", "Worker", 1), ("parameter-server-1 (59 s)", "ParameterServer", 1)],
    )
    def test_the_one_pod_that_is_waited_for_is_named(self, waiting_for, role, index):
        last_role, last_index, by_role = self.restarts(self.stalled(waiting_for))
        assert (last_role, last_index) == (role, index)
        assert by_role == {"Master": 0, "ParameterServer": 0, "Worker": 0, role: 1}

    @pytest.mark.parametrize(
        "waiting_for", [None, "worker-0, worker-1 (59 s)", "the last checkpoint", "worker-7 (3 s)"]
    )
    def test_else_no_pod_is(self, waiting_for):
        last_role, last_index, by_role = self.restarts(self.stalled(waiting_for))
        assert (last_role, last_index) == ("Job", 0)
        assert by_role == {"Master": 0, "ParameterServer": 0, "Worker": 0}
