"""What a training costs the operator while nothing but steps happens: passes and writes are counted on a virtual clock.

`python -m simulation.test_quiet_training [JOBS] [MINUTES]` (from tests/) prints the counts.
"""

import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from disttrain.controller import progress_turns
from disttrain.controller.reconcile import Reconciler
from simulation.controller import cluster
from simulation.controller.life import Course, Life
from simulation.controller.stories import Job

STARTED_SECONDS = 120.0


def counts(
    monkeypatch: pytest.MonkeyPatch, jobs: int, minutes: int, kind: str = "loop", **spec: Any
) -> tuple[float, float]:
    """Passes, and writes of the status, of a job in a minute of its training."""
    monkeypatch.setattr(cluster, "STEPS", 10**6)
    passes = 0
    reconcile = Reconciler.reconcile

    async def counted(self: Reconciler, *arguments: Any) -> None:
        nonlocal passes
        passes += 1
        await reconcile(self, *arguments)

    monkeypatch.setattr(Reconciler, "reconcile", counted)
    life = Life(Course(()), (), random.Random(0))
    try:
        life.operators[0].lead()
        made = [Job(life.cluster, "blue", f"job-{number}", kind, {}) for number in range(jobs)]
        for job in made:
            job.create(**spec)
        life.world.run(lambda: False, most=STARTED_SECONDS)
        assert {job.status["state"] for job in made} == {"Training"}
        passes, before = 0, life.oracle.progress_writes
        life.world.run(lambda: False, most=STARTED_SECONDS + 60.0 * minutes)
        assert {job.status["state"] for job in made} == {"Training"}
        return passes / jobs / minutes, (life.oracle.progress_writes - before) / jobs / minutes
    finally:
        life.world.dispose()


@pytest.mark.parametrize(("interval", "writes"), [(5, 12), (10, 6), (3600, 0)])
def test_a_training_costs_a_pass_for_each_write_and_one_or_so_a_minute(
    monkeypatch: pytest.MonkeyPatch, interval: int, writes: int
) -> None:
    """The one follows from the report that was a minute old if none had come since, and is made up to ten seconds early. And a write makes
    one more when the watch reports it before its answer arrives: here one of eight."""
    passes, written = counts(monkeypatch, 1, 10, observability={"statusIntervalSeconds": interval})
    assert written == pytest.approx(writes, abs=0.2)
    assert passes <= written * 9 / 8 + 1.4


def test_many_trainings_share_the_writes_and_each_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval is what comes out."""
    monkeypatch.setattr(progress_turns, "PROGRESS_WRITES_PER_SECOND", 0.5)
    passes, written = counts(monkeypatch, 10, 5, observability={"statusIntervalSeconds": 5})
    assert written == pytest.approx(0.5 * 60 / 10, rel=0.05)
    assert passes <= written * 9 / 8 + 1.4


def test_jobs_to_which_nothing_happens_are_looked_at_once_in_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of them cost the operator less than two passes a second."""
    passes, written = counts(monkeypatch, 10, 20, kind="command")
    assert (passes, written) == (pytest.approx(0.1, abs=0.02), 0)


def main(arguments: Sequence[str]) -> None:
    jobs, minutes = (*map(int, arguments), *(1, 10)[len(arguments) :])
    with pytest.MonkeyPatch.context() as monkeypatch:
        passes, writes = counts(monkeypatch, jobs, minutes, observability={"statusIntervalSeconds": 5})
    print(f"{jobs} jobs, {minutes} minutes: {passes:.1f} passes and {writes:.1f} status writes a job and minute")


if __name__ == "__main__":
    main(sys.argv[1:])
