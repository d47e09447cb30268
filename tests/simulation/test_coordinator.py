"""The coordinator of parameter servers, whatever fails and whatever comes late: every part counts once, and the job ends.

A few schedules run with every `make test`; `make simulation` runs ten thousand. A schedule that breaks a promise names its seed and the
command that replays it. See simulation/training/job.py for what may happen, oracle.py for the promises, planted.py for the bugs by which
the simulation itself is tested.
"""

import logging
from collections.abc import Callable, Iterator

import pytest

from simulation.training.job import Job, run
from simulation.training.oracle import Violation
from simulation.training.planted import PLANTED
from width import WIDE

SCHEDULES = 10_000 if WIDE else 200
AT_ONCE = 500
"""Schedules of one test: a test has two minutes."""
TO_FIND = 3000
"""Schedules in which a planted bug must be found. The rarest takes some hundreds: a message must come late twice."""


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """The log lines of ten thousand trainings."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, SCHEDULES, AT_ONCE))
def test_any_schedule(first: int) -> None:
    for seed in range(first, min(first + AT_ONCE, SCHEDULES)):
        run(seed)


@pytest.mark.parametrize(("plant", "found"), PLANTED)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert any(found in _violation(seed) for seed in range(TO_FIND))


def test_a_schedule_is_its_seed() -> None:
    """Replayed, it is the same to the last message."""
    traces: tuple[list[str], list[str]] = ([], [])
    for trace in traces:
        Job(7, trace=trace.append).run()
    assert traces[0] == traces[1]
    assert len(traces[0]) > 50


def _violation(seed: int) -> str:
    """What is wrong with a schedule; empty if nothing is."""
    try:
        run(seed)
    except Violation as violation:
        return str(violation)
    return ""
