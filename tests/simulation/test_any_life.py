"""Whole operators, whatever fails: the end is that of a calm life, with few more writes, and no promise is broken on the way.

The real cache, intake, expectations, comparison, reconciler, executor and status writer run on a virtual clock in front of an API server in
memory (simulation/controller). A seed decides everything; one that breaks a promise is lived again, with all that happened in it, by the
command that the failure names.
"""

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from simulation.controller.api_server import merged
from simulation.controller.life import Course, Life, course_of, run
from simulation.controller.mutations import MUTATIONS, Mutation
from simulation.controller.oracle import Violation
from simulation.controller.stories import EDITS, SPECS, edits
from width import WIDE

SEEDS = 50_000 if WIDE else 4_000
AT_ONCE = 500
"""Seeds of one test."""
REPLAY = "PYTHONPATH=tests .venv/bin/python -m simulation.controller.replay"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_any_life(first: int) -> None:
    broken = [line for seed in range(first, min(first + AT_ONCE, SEEDS)) if (line := _broken(seed))]
    assert not broken, "\n".join(broken)


def test_a_life_is_its_seed() -> None:
    """Lived again, it is the same to the last request."""
    seed = next(seed for seed in range(100) if len(course_of(seed)[1]) == 3)
    traces: tuple[list[str], list[str]] = ([], [])
    for trace in traces:
        run(seed, trace=trace.append)
    assert _without_random_names(traces[0]) == _without_random_names(traces[1])
    assert len(traces[0]) > 30


def edited(kind: str, options: dict[str, Any], patches: Sequence[dict[str, Any]]) -> Any:
    """The end of a job that is created with these options and then edited."""
    life = Life(Course((("blue", kind, 0, 0),)), (), random.Random(0), stories=(edits(patches),))
    life.jobs[0].options = options
    return life.run().digest


@pytest.mark.parametrize("kind", SPECS)
def test_a_job_that_is_edited_ends_like_one_that_was_created_so(kind: str) -> None:
    for seed in range(6):
        chosen = random.Random(seed).sample(EDITS, 1 + seed % 4)
        spec = functools.reduce(merged, chosen, {})
        assert edited(kind, {}, chosen) == edited(kind, spec, ()), chosen


@pytest.mark.parametrize("kind", SPECS)
def test_an_edit_and_its_undo_leave_no_trace(kind: str) -> None:
    before = {"network": {"policy": "JobOnly"}, "runPolicy": {"backoffLimit": 6, "cleanPodPolicy": "Running"}}
    for edit in EDITS[:3]:
        assert edited(kind, before, (edit, before)) == edited(kind, before, ()), edit


def _broken(seed: int) -> str:
    """What is wrong with a life, and the command that shows it; empty if nothing is."""
    try:
        run(seed)
    except Violation as violation:
        return f"{REPLAY} {seed}\n    {violation}"
    return ""


def _without_random_names(trace: list[str]) -> list[str]:
    """Names of Events and Secrets are drawn, for no other client may know them before."""
    return [line.rpartition(".")[0] if " events " in line else line for line in trace]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_bug_to_plant_fits_the_code(mutation: Mutation) -> None:
    """tools/mutate plants them: `make mutate`."""
    text = (Path(__file__).parents[2] / "operator/disttrain" / mutation.path).read_text()
    assert text.count(mutation.before) == 1
