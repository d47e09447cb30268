"""status.goodput and Prometheus show the same: both have the master's count."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.api.goodput import BUCKETS, MasterGoodput
from unit.plan.builders import make_job

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
