"""Whatever a snapshot holds, also what no cluster would ever show: decide answers, with a status that the API server takes.

A job whose pass raises is a job that the operator no longer manages.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.api import DistTrainJob, Progress, Termination
from disttrain.api.names import ChildKind, Role, pod_name
from disttrain.api.status import DistTrainJobStatus
from disttrain.plan import Snapshot, decide
from disttrain.plan.model import MadeSecret, Phase, PodView, Refusal
from simulation.jobs import jobs
from width import WIDE

NOW = datetime(2026, 1, 1, 12, 0, 0, 500_000, tzinfo=UTC)
PASSES = 8

moments = st.integers(-4000, 10).map(lambda seconds: NOW + timedelta(seconds=seconds))
counts = st.integers(0, 2**31 - 1)
floats = st.floats(allow_nan=True, allow_infinity=True)
reports = st.builds(
    Progress,
    attempt=st.integers(1, 3),
    step=counts,
    total_steps=st.none() | counts,
    epoch=st.none() | counts,
    loss=st.none() | floats,
    nan_loss=st.none() | st.text(),
    samples_per_second=st.none() | floats,
    world_size=counts,
    evaluation=st.none() | st.dictionaries(st.text(max_size=400), floats, max_size=40),
    last_update_time=st.none() | moments,
    last_checkpoint=st.none() | st.fixed_dictionaries({"step": counts, "time": moments}),
    waiting_for=st.none() | st.text(),
    finished=st.booleans(),
)
terminations = st.builds(Termination, message=st.text(), where=st.text(), progress=st.none() | reports)


@st.composite
def pods(draw: st.DrawFn) -> tuple[PodView, ...]:
    places = st.tuples(st.sampled_from(Role), st.integers(0, 3))
    return tuple(
        PodView(
            name=pod_name("job", role, index),
            uid=f"uid-{role}-{index}",
            role=role,
            index=index,
            attempt=draw(st.integers(1, 3)),
            phase=draw(st.sampled_from(Phase)),
            created=draw(moments),
            ready=draw(st.booleans()),
            scheduled=draw(st.booleans()),
            deleting=draw(st.booleans()),
            deletion_deadline=draw(st.none() | moments),
            finished=draw(st.none() | moments),
            exit_code=draw(st.none() | st.integers(0, 255)),
            reason=draw(
                st.sampled_from(("", "Error", "OOMKilled", "Unschedulable", "ErrImagePull", "NodeLost")) | st.text()
            ),
            message=draw(st.text() | st.just("x" * 50_000)),
            termination=draw(terminations),
            conditions=draw(st.frozensets(st.sampled_from(("DisruptionTarget", "PodScheduled")))),
        )
        for role, index in draw(st.lists(places, max_size=8, unique=True))
    )


snapshots = st.builds(
    Snapshot,
    job=jobs().map(DistTrainJob.parse),
    now=st.just(NOW),
    pods=pods(),
    children=st.frozensets(st.sampled_from(ChildKind)),
    secret=st.none() | st.builds(MadeSecret, uid=st.sampled_from(("", "secret-1")), public_key=st.just("AA==")),
    progress=st.none() | reports,
    progress_read=st.none() | moments,
    refusals=st.lists(
        st.builds(Refusal, name=st.text(), message=st.text(), retryable=st.booleans(), time=moments), max_size=2
    ).map(tuple),
    name_conflicts=st.lists(st.text(), max_size=2).map(tuple),
)


@pytest.mark.timeout(0 if WIDE else 120)
@given(st.lists(st.tuples(snapshots, st.booleans()), min_size=1, max_size=3))
@settings(
    max_examples=10_000 if WIDE else 100, deadline=None, derandomize=not WIDE, suppress_health_check=list(HealthCheck)
)
def test_decide_answers_and_comes_to_rest(views: list[tuple[Snapshot, bool]]) -> None:
    """While the cluster does not change, passes reach a status that they leave as it is; the next snapshot begins from it."""
    job, now = views[0][0].job, NOW
    for view, suspend in views:
        job = job.model_copy(update={"spec": job.spec.model_copy(update={"suspend": suspend})})
        now += timedelta(minutes=10)
        job = comes_to_rest(replace(view, job=job, now=now))


def comes_to_rest(snapshot: Snapshot) -> DistTrainJob:
    for _ in range(PASSES):
        plan = decide(snapshot)
        assert plan.look_again is None or plan.look_again >= timedelta(0)
        stored = DistTrainJobStatus.model_validate(plan.status.to_dict())
        assert stored == plan.status, "a status that reads back as another one is written for ever"
        if stored == snapshot.status:
            assert plan.events == (), "news without a change"
            return snapshot.job
        snapshot = replace(snapshot, job=snapshot.job.model_copy(update={"status": stored}))
    raise AssertionError("the passes do not come to rest")
