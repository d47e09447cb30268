"""status.training: what it says, and how seldom it is written."""

from datetime import timedelta

import pytest

from disttrain.api.reasons import JobState
from disttrain.plan.model import Phase
from disttrain.plan.progress import is_news, pass_after, read_interval, rounded
from unit.plan.builders import NOON, make_job


def test_the_report_in_short_strings():
    scene = make_job().started()
    scene.reports(
        27, total=100, epoch=2, loss=0.183444, samples_per_second=64.0, world_size=2, max_staleness_seen=3
    ).seen()
    training = scene.status.training
    assert (training.step, training.total_steps, training.progress_percent, training.epoch) == (27, 100, 27, 2)
    assert (training.loss, training.samples_per_second, training.max_staleness_seen) == (0.1834, 64, 3)
    assert training.eta_seconds == 73, "73 steps of 64 samples at 64 samples a second"
    assert training.last_update_time == NOON


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (0.183444, 4, 0.1834),
        (5120.41, 5, 5120.4),
        (131072.4, 5, 131072),
        (0.00001234, 4, 1.234e-05),
        (0.0, 4, 0),
        (2.5e20, 4, 2.5e20),
        (-1.5, 4, -1.5),
        (1.7976931348623157e308, 4, 1.7976931348623157e308),
        (float("nan"), 5, None),
        (float("inf"), 5, None),
        (None, 5, None),
    ],
)
def test_numbers_are_rounded_and_what_is_no_json_is_left_out(value, digits, expected):
    assert rounded(value, digits) == expected


def test_the_time_left_of_a_script_comes_from_its_steps():
    scene = make_job().script().started().reports(10).seen().after(10).reports(30).seen()
    assert scene.status.training.eta_seconds == 35


def test_progress_alone_is_written_once_in_an_interval():
    scene = make_job().training(step=0)
    writes = 0
    for second in range(1, 61):
        before = scene.status
        scene.after(1).reports(second).step()
        writes += scene.status != before
    assert writes == 12


def test_what_else_changes_takes_the_progress_along():
    scene = make_job().training(step=1).after(1).reports(2)
    assert scene.plan().status == scene.status
    scene.failed(0).step()
    assert scene.status.training.step == 2


def test_speed_without_steps_is_no_change():
    scene = make_job().training()
    before = scene.status
    for rate in (9.0, 5.0, 1.0):
        scene.after(10).reports(10, samples_per_second=rate).step()
    assert scene.status == before


def test_a_report_of_another_attempt_is_ignored():
    scene = make_job().started().reports(50, attempt=7).seen()
    assert scene.status.training is None


def test_a_rollback_is_shown():
    scene = make_job().servers(1).training(step=50).after(10).reports(40).seen()
    assert scene.status.training.step == 40
    assert scene.status.training.last_update_time == NOON, "a fall back is no advance"


@pytest.mark.parametrize(("status", "read"), [(1, 1), (5, 5), (10, 10), (11, 10), (3600, 10)])
def test_the_master_is_read_often_enough_not_to_count_as_silent_however_seldom_the_status_is_written(status, read):
    scene = make_job().spec(observability={"statusIntervalSeconds": status}).training()
    assert read_interval(scene.job.spec) == timedelta(seconds=read)


def test_a_status_that_is_written_seldom_is_written_seldom_and_its_master_is_not_silent():
    scene = (
        make_job().spec(observability={"statusIntervalSeconds": 3600}).training(step=0).after(3600).reports(1).seen()
    )
    writes = 0
    for step in range(2, 360):
        before = scene.status
        scene.after(read_interval(scene.job.spec).total_seconds()).reports(step).step()
        writes += scene.status != before
    assert writes == 0
    assert scene.says("Progressing") == ("True", "Training")


def test_a_training_that_hangs_is_stalled_in_time_however_seldom_its_status_is_written():
    scene = make_job().spec(observability={"statusIntervalSeconds": 3600}).training(step=5)
    scene.after(10).reports(6)
    scene.step_seen = scene.now
    hangs = scene.now
    while scene.status.state is not JobState.RESTARTING:
        scene.after(10).reports(6, last_update_time=hangs).seen()
    assert scene.now - hangs <= timedelta(seconds=910)
    assert scene.status.training.last_update_time == hangs
    assert scene.status.restarts.last.reason == "Stalled"


def test_a_training_without_news_is_looked_at_when_its_report_is_too_old_to_believe():
    assert make_job().training().plan().look_again == timedelta(seconds=60)


def test_a_training_with_news_is_looked_at_when_they_are_written():
    scene = make_job().spec(observability={"statusIntervalSeconds": 7}).training().after(2).reports(11)
    assert scene.plan().look_again == timedelta(seconds=5)
    assert scene.step().status.training.step == 10
    assert scene.after(5).step().status.training.step == 11


def test_a_report_asks_for_a_pass_when_it_differs_or_ends_a_silence():
    report = make_job().training().report
    assert not is_news(report, report, NOON, NOON + timedelta(seconds=59))
    assert is_news(report, report, NOON, NOON + timedelta(seconds=60))
    assert is_news(report, report.model_copy(update={"step": 9}), NOON, NOON)
    assert is_news(report, None, None, NOON)


@pytest.mark.parametrize(
    ("fields", "wait"),
    [
        pytest.param({"step": 11, "loss": 0.3}, 5, id="newer figures"),
        pytest.param({"step": 11, "waiting_for": "worker-1 (9 s)"}, 5, id="running seconds"),
        pytest.param({"step": 9}, None, id="a step back"),
        pytest.param({"step": 11, "finished": True}, None, id="the end"),
        pytest.param({"step": 11, "waiting_for": "worker-0 (4 s)"}, None, id="another pod is waited for"),
        pytest.param({"step": 11, "world_size": 1}, None, id="fewer processes"),
        pytest.param({"step": 11, "nan_loss": "rank 0, step 11"}, None, id="a loss that is not finite"),
    ],
)
def test_a_report_with_newer_figures_alone_waits_until_they_are_written(fields, wait):
    scene = make_job().training().reports(10, waiting_for="worker-1 (4 s)").seen()
    after = scene.report.model_copy(update=fields)
    assert pass_after(scene.job, scene.report, after, scene.now) == (None if wait is None else timedelta(seconds=wait))


def test_a_report_asks_for_a_pass_at_once_where_a_step_may_change_the_state():
    scene = make_job().started()
    report = scene.reports(0, last_update_time=None).seen().report
    assert pass_after(scene.job, report, report.model_copy(update={"step": 1}), scene.now) is None
    scene = make_job().training()
    report = scene.after(61).seen().report
    assert scene.says("Progressing")[0] == "Unknown"
    assert pass_after(scene.job, report, report.model_copy(update={"step": 11}), scene.now) is None


def test_newer_figures_are_due_when_the_interval_is_over_or_no_other_step_may_follow():
    scene = make_job().training().after(9)
    after = scene.report.model_copy(update={"step": 11})
    assert pass_after(scene.job, scene.report, after, scene.now) == timedelta(0)
    scene.spec(observability={"statusIntervalSeconds": 3600})
    assert pass_after(scene.job, scene.report, after, scene.now) == timedelta(seconds=60)


def test_figures_that_are_shown_with_the_next_step_alone_wait_for_it():
    scene = make_job().training().after(9)
    after = scene.report.model_copy(update={"samples_per_second": 1.0, "staleness": 3})
    assert pass_after(scene.job, scene.report, after, scene.now) == timedelta(seconds=60)
    evaluated = after.model_copy(update={"evaluation_step": 10})
    assert pass_after(scene.job, after, evaluated, scene.now) == timedelta(0)


@pytest.mark.parametrize(
    ("metric", "good", "bad"),
    [
        ({"metric": "Loss", "above": 20}, {"loss": 20.0}, {"loss": 20.5}),
        ({"metric": "SamplesPerSecond", "below": 9}, {"samples_per_second": 9.0}, {"samples_per_second": 8.0}),
        ({"metric": "GradientNorm", "above": 3}, {"gradient_norm": None}, {"gradient_norm": 4.0}),
    ],
)
def test_a_report_that_begins_or_ends_a_breach_asks_for_a_pass_at_once(metric, good, bad):
    rule = {"name": "bounded", "forSeconds": 60, "action": "Event", **metric}
    scene = make_job().spec(health={"rules": [rule]}).training()
    fine = scene.reports(11, **good).seen().report
    worse = fine.model_copy(update={"step": 12, **bad})
    assert pass_after(scene.job, fine, worse, scene.now) is None
    assert pass_after(scene.job, worse, fine.model_copy(update={"step": 13}), scene.now) is None
    assert pass_after(scene.job, worse, worse.model_copy(update={"step": 13}), scene.now) is not None
    assert pass_after(scene.job, fine, fine.model_copy(update={"step": 13}), scene.now) is not None


def test_a_step_that_ends_a_breach_of_step_age_asks_for_a_pass_at_once():
    rule = {"name": "hangs", "metric": "StepAge", "above": 5, "forSeconds": 60, "action": "Event"}
    scene = make_job().spec(health={"rules": [rule]}).training()
    same = scene.report
    assert pass_after(scene.job, same, same.model_copy(update={"step": 11}), scene.now) is not None
    scene.after(8).reports(10, last_update_time=NOON).seen()
    assert pass_after(scene.job, same, same.model_copy(update={"step": 11}), scene.now) is None


class TestNothingMoves:
    """What is said of a training that makes no steps: no speed, no time left."""

    def fast(self):
        return make_job().training().after(5).reports(11, samples_per_second=64.0).seen()

    def speed_and_eta(self, scene):
        return scene.status.training.samples_per_second, scene.status.training.eta_seconds

    def test_while_steps_are_made_both_are_there(self):
        assert self.speed_and_eta(self.fast()) == (64, 89)

    @pytest.mark.parametrize(
        "happens",
        [
            pytest.param(lambda scene: scene.spec(suspend=True), id="suspended"),
            pytest.param(lambda scene: scene.failed(0, code=1), id="failed"),
            pytest.param(lambda scene: scene.failed(0), id="a worker is replaced"),
            pytest.param(lambda scene: scene.gone(0), id="a worker was deleted"),
            pytest.param(lambda scene: scene.node_falls_silent(0), id="a node is silent"),
            pytest.param(lambda scene: scene.rules(default="RestartJob").failed(0), id="the job is restarted"),
            pytest.param(lambda scene: scene.after(61).reports(11, samples_per_second=64.0), id="no step for a minute"),
            pytest.param(lambda scene: scene.after(901).reports(11, samples_per_second=64.0), id="a stall"),
            pytest.param(lambda scene: scene.after(61), id="the operator cannot reach the master"),
        ],
    )
    def test_they_go_and_the_step_stays(self, happens):
        scene = self.fast()
        happens(scene)
        scene.seen()
        assert self.speed_and_eta(scene) == (None, None)
        assert scene.status.training.step == 11

    def test_they_come_back_with_the_next_step(self):
        scene = self.fast().failed(0).seen().after(1).seen().all_run().seen()
        assert self.speed_and_eta(scene) == (None, None)
        assert self.speed_and_eta(scene.after(5).reports(12, samples_per_second=64.0).seen()) == (64, 88)

    def test_of_a_training_that_goes_on_without_the_lost_worker_they_stay(self):
        scene = make_job().servers(1).training().gone(1).seen()
        for step in range(11, 30):
            scene.change(1, phase=Phase.PENDING, ready=False).after(3).reports(step, samples_per_second=64.0).seen()
        assert scene.status.state is JobState.RESTARTING
        assert self.speed_and_eta(scene)[0] == 64

    def test_a_complete_job_keeps_the_speed_that_it_had(self):
        scene = self.fast().after(5).reports(100, samples_per_second=64.0, finished=True).succeeded(0, 1, ago=20).seen()
        assert scene.status.state is JobState.COMPLETE
        assert self.speed_and_eta(scene) == (64, 0)

    def test_a_training_that_makes_no_step_for_a_minute_is_not_progressing(self):
        scene = self.fast().after(59).reports(11).seen()
        assert scene.status.state is JobState.TRAINING
        scene.after(1).reports(11).seen()
        assert scene.status.state is JobState.STALLED
        assert scene.says("Progressing") == ("False", "NoStep")
        assert scene.condition("Progressing").message == "No step was seen since 12:00:05 UTC"
        assert scene.says("Ready")[0] == "True"
        assert scene.after(5).reports(12).seen().status.state is JobState.TRAINING

    def test_steps_that_take_long_are_waited_for_three_times_as_long(self):
        scene = make_job().training(step=0)
        for step in range(1, 5):
            scene.after(300).reports(step, samples_per_second=64 / 300).seen()
        assert scene.after(890).reports(4, samples_per_second=64 / 300).step().status.state is JobState.TRAINING
        assert scene.after(11).reports(4, samples_per_second=64 / 300).step().status.state is JobState.STALLED

    def test_of_a_script_the_usual_step_is_what_its_steps_have_taken(self):
        scene = make_job().script().started().reports(1).seen()
        for step in range(2, 12):
            scene.after(60).reports(step).seen()
        assert scene.after(160).reports(11).seen().status.state is JobState.TRAINING
        assert scene.after(30).reports(11).seen().status.state is JobState.STALLED

    def test_after_its_last_step_a_training_evaluates_in_its_own_time(self):
        scene = self.fast().after(5).reports(100).seen()
        assert scene.after(600).reports(100).seen().status.state is JobState.TRAINING


def test_where_a_training_began_is_kept_in_the_status_and_reported_once():
    reported = "Resumed at step 40; changed: trainer.optimizer.learningRate: 0.05 -> 0.01"
    scene = make_job().started().reports(40, resumed=reported)
    assert [event.message for event in scene.plan().events if event.reason == "Resumed"] == [reported]
    scene.seen().after(10).reports(50, resumed=reported)
    assert not [event for event in scene.plan().events if event.reason == "Resumed"]
    assert scene.seen().status.training.resumed == reported
    scene.after(10).reports(60, world_size=0).seen()
    assert scene.status.training.resumed == reported, "a master without a round has not looked yet"
    scene.after(10).reports(70).seen()
    assert scene.status.training.resumed is None, "a later attempt had a plain start"

    def test_a_script_that_reports_a_thousand_steps_at_a_time_is_not_missed_between(self):
        scene = make_job().script().started().reports(1000, total=None).seen()
        for step in range(2, 8):
            for _ in range(30):
                scene.after(10).reports((step - 1) * 1000, total=None).seen()
                assert scene.status.state is JobState.TRAINING or step == 2, "of the first one nothing is known"
            scene.reports(step * 1000, total=None).seen()
        assert scene.after(890).reports(7000, total=None).seen().status.state is JobState.TRAINING
        assert scene.after(20).reports(7000, total=None).step().status.state is JobState.STALLED

    def test_of_our_own_loop_a_pause_before_the_last_step_does_not_make_the_next_one_usual(self):
        scene = make_job().training().after(110).reports(50, samples_per_second=5000.0).seen()
        assert scene.after(61).reports(50).seen().status.state is JobState.STALLED
