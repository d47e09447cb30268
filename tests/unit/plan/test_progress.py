"""status.training and status.goodput: what they say, and how seldom they are written."""

from datetime import timedelta

import pytest

from disttrain.api.reasons import JobState
from disttrain.api.runtime import TimeSpent
from disttrain.plan.indexes import format_indexes, parse_indexes
from disttrain.plan.model import Phase
from disttrain.plan.progress import read_interval, rounded
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


def test_speed_without_steps_is_no_news():
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


def test_every_second_is_in_one_bucket():
    scene = make_job().seen()
    scene.after(10).seen()
    scene.all_run().seen().after(5).reports(1).seen()
    for step in range(2, 22):
        scene.after(5).reports(step).seen()
    scene.failed(0).seen().after(3).seen().all_run().seen()
    scene.spec(suspend=True).seen().after(1000).spec(suspend=False).seen().after(7).all_run().seen()
    scene.succeeded(0, 1, ago=20).seen()
    goodput = scene.status.goodput
    told = [goodput.queued_seconds, goodput.starting_seconds, goodput.productive_seconds, goodput.stalled_seconds]
    assert told == [10 + 7, 5 + 3, 100, 0]
    assert goodput.accounted_until == scene.status.completion_time


def test_steps_that_are_done_again_were_not_productive():
    scene = make_job().servers(1).training(step=0).after(100).reports(100).seen().after(5).reports(75).seen()
    goodput = scene.status.goodput
    assert (goodput.productive_seconds, goodput.redone_seconds) == (79, 26)
    assert goodput.productive_seconds + goodput.redone_seconds == 105


def spent(began=NOON, **seconds):
    return TimeSpent(began=began, **{f"{name}_seconds": value for name, value in seconds.items()})


def buckets(scene):
    """status.goodput; each second since the start must be in one bucket."""
    goodput = scene.status.goodput
    seconds = goodput.model_dump(exclude={"accounted_until", "master"})
    assert timedelta(seconds=sum(seconds.values())) == goodput.accounted_until - scene.status.start_time
    return {name.removesuffix("_seconds"): value for name, value in seconds.items() if value}


def test_the_masters_count_of_the_time_is_taken_as_it_is_and_the_time_before_it_added():
    scene = make_job().seen().after(10).seen().all_run().seen()
    began = scene.now
    scene.after(4).reports(0, goodput=spent(began, starting=3.5)).seen()
    scene.after(5).reports(3, goodput=spent(began, starting=6.2, productive=2.0, undecided=0.8)).seen()
    scene.after(5).reports(3, goodput=spent(began, starting=6.2, productive=2.0, undecided=5.8)).seen()
    scene.after(5).reports(9, goodput=spent(began, starting=6.2, productive=12.0, undecided=0.8)).seen()
    assert buckets(scene) == {"queued": 10, "starting": 6 + 1, "productive": 12}
    scene.after(60).reports(9, goodput=spent(began, starting=6.2, productive=12.0, stalled=60.8)).seen()
    scene.after(5).reports(12, goodput=spent(began, starting=6.2, productive=14.4, redone=2.6, stalled=60.8)).seen()
    assert buckets(scene) == {"queued": 10, "starting": 7, "productive": 14, "redone": 2, "stalled": 60}


def test_time_in_which_the_master_was_not_heard_is_counted_once_it_is_heard_again():
    scene = make_job().training(step=1)
    scene.after(2).reports(2, goodput=spent(scene.now, productive=2.0)).seen()
    began = scene.now
    scene.after(300).new_operator().after(20).seen()
    scene.after(5).reports(90, goodput=spent(began, productive=200.0, stalled=127.0)).seen()
    assert buckets(scene) == {"productive": 200, "stalled": 127}


def test_another_master_counts_from_its_own_start():
    scene = make_job().training(step=1)
    first, second = scene.now, scene.now + timedelta(seconds=20)
    scene.after(10).reports(5, goodput=spent(first, starting=2.0, productive=8.0)).seen()
    assert buckets(scene) == {"starting": 2, "productive": 8}
    scene.after(20).reports(7, goodput=spent(second, starting=5.0, productive=5.0)).seen()
    # Ten of the twenty seconds had no master: they are the state's.
    assert buckets(scene) == {"starting": 2 + 5, "productive": 8 + 5 + 10}


def test_a_job_that_ends_leaves_no_second_out():
    scene = make_job().training(step=1)
    scene.after(10).reports(100, goodput=spent(scene.now, productive=9.0, undecided=1.0), finished=True).seen()
    scene.after(23).succeeded(0, 1, ago=20).seen()
    assert buckets(scene) == {"productive": 33}
    assert scene.status.goodput.accounted_until == scene.status.completion_time


def test_a_job_that_lost_a_pod_and_finds_no_node_for_it_waits_in_the_queue():
    scene = make_job().training(step=1)
    scene.after(50).reports(2).gone(1).seen()
    full = {"phase": Phase.PENDING, "reason": "Unschedulable", "message": "0/3 nodes are available"}
    scene.after(1).change(1, **full).seen()
    scene.after(3600).reports(2).all_run().seen()
    assert buckets(scene) == {"productive": 50, "starting": 1, "queued": 3600}


@pytest.mark.parametrize(
    ("indexes", "text"),
    [
        ((), ""),
        ((3,), "3"),
        ((0, 1, 2), "0-2"),
        ((5, 0, 2, 1), "0-2,5"),
        ((0, 2, 4), "0,2,4"),
        ((9, 10, 11, 13, 14), "9-11,13-14"),
    ],
)
def test_indexes_are_short_and_come_back(indexes, text):
    assert format_indexes(indexes) == text
    assert parse_indexes(text) == frozenset(indexes)


@pytest.mark.parametrize(("status", "read"), [(1, 1), (5, 5), (10, 10), (11, 10), (3600, 10)])
def test_the_master_is_read_often_enough_to_be_heard_however_seldom_the_status_is_written(status, read):
    scene = make_job().spec(observability={"statusIntervalSeconds": status}).training()
    assert read_interval(scene.job.spec) == timedelta(seconds=read)
    assert scene.plan().look_again == timedelta(seconds=read)


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


def test_polling_goes_on_while_pods_run():
    scene = make_job().spec(observability={"statusIntervalSeconds": 7}).training()
    assert scene.plan().look_again == timedelta(seconds=7)


class TestNothingMoves:
    """What is said of a training that makes no steps: no speed, no time left."""

    def fast(self):
        return make_job().training().after(5).reports(11, samples_per_second=64.0).seen()

    def told(self, scene):
        return scene.status.training.samples_per_second, scene.status.training.eta_seconds

    def test_while_steps_are_made_both_are_there(self):
        assert self.told(self.fast()) == (64, 89)

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
            pytest.param(lambda scene: scene.after(61), id="the master is not heard"),
        ],
    )
    def test_they_go_and_the_step_stays(self, happens):
        scene = self.fast()
        happens(scene)
        scene.seen()
        assert self.told(scene) == (None, None)
        assert scene.status.training.step == 11

    def test_they_come_back_with_the_next_step(self):
        scene = self.fast().failed(0).seen().after(1).seen().all_run().seen()
        assert self.told(scene) == (None, None)
        assert self.told(scene.after(5).reports(12, samples_per_second=64.0).seen()) == (64, 88)

    def test_of_a_training_that_goes_on_without_the_lost_worker_they_stay(self):
        scene = make_job().servers(1).training().gone(1).seen()
        for step in range(11, 30):
            scene.change(1, phase=Phase.PENDING, ready=False).after(3).reports(step, samples_per_second=64.0).seen()
        assert scene.status.state is JobState.RESTARTING
        assert self.told(scene)[0] == 64

    def test_a_complete_job_keeps_the_speed_that_it_had(self):
        scene = self.fast().after(5).reports(100, samples_per_second=64.0, finished=True).succeeded(0, 1, ago=20).seen()
        assert scene.status.state is JobState.COMPLETE
        assert self.told(scene) == (64, 0)

    def test_a_training_that_makes_no_step_for_a_minute_is_not_progressing(self):
        scene = self.fast().after(60).reports(11).seen()
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


def test_where_a_training_began_is_kept_in_the_status_and_told_once():
    told = "Resumed at step 40; changed: trainer.optimizer.learningRate: 0.05 -> 0.01"
    scene = make_job().started().reports(40, resumed=told)
    assert [event.message for event in scene.plan().events if event.reason == "Resumed"] == [told]
    scene.seen().after(10).reports(50, resumed=told)
    assert not [event for event in scene.plan().events if event.reason == "Resumed"]
    assert scene.seen().status.training.resumed == told
    scene.after(10).reports(60, world_size=0).seen()
    assert scene.status.training.resumed == told, "a master without a world has not looked yet"
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
