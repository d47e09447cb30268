"""status.goodput: every second is in one bucket, and Prometheus shows the same, since both have the master's count."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.api.goodput import BUCKETS, MasterGoodput
from disttrain.api.runtime import TimeSpent
from disttrain.plan.model import Phase
from unit.plan.builders import NOON, make_job

LOOKS = st.lists(st.tuples(st.integers(1, 90), st.integers(-3, 5), st.booleans()), min_size=1, max_size=20)
"""Seconds until the next look, the steps made meanwhile (a fall back is below 0), whether a process is missing."""


@settings(max_examples=25, deadline=None)
@given(LOOKS)
def test_status_has_the_seconds_of_each_bucket_that_the_master_counted(looks: list[tuple[int, int, bool]]) -> None:
    scene = make_job().seen().all_run().seen()
    master, now, step = MasterGoodput(0.0, began=scene.now), 0.0, 0
    for seconds, steps, missing in looks:
        now, step = now + seconds, max(0, step + steps)
        waiting = "worker-0" if missing else None
        fields = {"waiting_for": waiting, "samples_per_second": 1.0 if step else None, "total": None}
        scene.after(seconds).reports(step, **fields)
        assert scene.report is not None
        master.look(scene.report, now)
        scene.reports(step, **fields, goodput=master.spent).seen()
    # What is not written yet because it is no news is written with the next report.
    scene.after(60).reports(step + 1, total=None, samples_per_second=1.0, goodput=master.spent).seen()
    status = scene.status.goodput
    assert status is not None
    counted = {bucket: getattr(status, f"{bucket}_seconds") for bucket in BUCKETS}
    assert counted == {bucket: int(seconds) for bucket, seconds in master.seconds.items()}


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
    counted = [goodput.queued_seconds, goodput.starting_seconds, goodput.productive_seconds, goodput.stalled_seconds]
    assert counted == [10 + 7, 5 + 3, 100, 0]
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


def test_time_in_which_the_master_did_not_report_is_counted_once_it_reports_again():
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
