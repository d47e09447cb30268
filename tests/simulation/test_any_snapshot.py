"""Whatever a snapshot holds, also what no cluster would ever show: decide answers, with a status that the API server takes.

A job whose pass raises is a job that the operator no longer manages.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.api import DistTrainJob, Progress, Termination
from disttrain.api.names import ChildKind, Role, pod_name
from disttrain.api.status import DistTrainJobStatus
from disttrain.plan import Snapshot, decide, look_again
from disttrain.plan.children import NEEDED
from disttrain.plan.model import MadeSecret, Phase, PodView, Refusal, Trouble
from disttrain.plan.view import JobView
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
    staleness=st.none() | counts,
    gradient_norm=st.none() | floats,
    world_size=counts,
    evaluation=st.none() | st.dictionaries(st.text(max_size=400), floats, max_size=40),
    last_update_time=st.none() | moments,
    last_checkpoint=st.none() | st.fixed_dictionaries({"step": counts, "time": moments}),
    waiting_for=st.none() | st.text(),
    finished=st.booleans(),
)
troubles = st.builds(
    Trouble, container=st.just("proxy"), words=st.text(), since=st.none() | moments, until=st.none() | moments
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
            disruption=draw(st.sampled_from(("", "", "DeletionByTaintManager", "TerminationByKubelet"))),
            node=draw(st.sampled_from(("node-1", "node-2"))),
            ready_since=draw(st.none() | moments),
            silent_since=draw(st.none() | st.none() | moments),
            trouble=draw(st.none() | st.none() | troubles),
        )
        for role, index in draw(st.lists(places, max_size=8, unique=True))
    )


def elastic(body: dict[str, Any], wanted: bool) -> dict[str, Any]:
    """The job with a number of workers that may fall, where its strategy allows it."""
    if wanted and "parameterServer" in body["spec"]:
        worker = body["spec"]["worker"]
        worker["elastic"] = {"minReplicas": 1, "maxReplicas": worker["replicas"]}
        body["spec"]["scheduling"] = {"timeoutSeconds": 60}
    return body


snapshots = st.builds(
    Snapshot,
    job=st.tuples(jobs(), st.booleans()).map(lambda drawn: DistTrainJob.parse(elastic(*drawn))),
    now=st.just(NOW),
    pods=pods(),
    children=st.frozensets(st.sampled_from(ChildKind)),
    secret=st.none() | st.builds(MadeSecret, uid=st.sampled_from(("", "secret-1")), public_key=st.just("AA==")),
    progress=st.none() | reports,
    progress_before=st.none() | reports,
    progress_read=st.none() | moments.filter(lambda moment: moment <= NOW),
    step_seen=st.none() | moments.filter(lambda moment: moment <= NOW),
    listening_since=st.none() | moments.filter(lambda moment: moment <= NOW),
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


def seldom(strategy: st.SearchStrategy[Any], otherwise: Any = None) -> st.SearchStrategy[Any]:
    return st.integers(0, 5).flatmap(lambda number: strategy if number == 5 else st.just(otherwise))


recent = st.integers(-150, 5).map(lambda seconds: NOW + timedelta(seconds=seconds))
past = recent.filter(lambda moment: moment <= NOW)


@st.composite
def whole_jobs(draw: st.DrawFn) -> list[Snapshot]:
    """A job that has every pod, several times: there is nothing to create or to delete, so that mostly the time decides."""
    body = elastic(draw(jobs()), draw(st.booleans()))
    body["spec"]["runPolicy"] |= draw(
        st.sampled_from(({}, {"ttlSecondsAfterFinished": 60}, {"activeDeadlineSeconds": 90}))
    )
    job = DistTrainJob.parse(body)
    return [draw(whole(job)) for _ in range(3)]


@st.composite
def whole(draw: st.DrawFn, job: DistTrainJob) -> Snapshot:
    view = JobView(Snapshot(job=job, now=NOW))
    usual = draw(st.sampled_from((Phase.RUNNING, Phase.RUNNING, Phase.PENDING, Phase.SUCCEEDED)))
    progress = st.builds(
        Progress,
        attempt=st.just(1),
        step=st.integers(0, 3),
        total_steps=st.just(100),
        last_update_time=st.just(NOW),
        waiting_for=seldom(st.just("worker-0 (4 s)")),
        finished=seldom(st.just(True), otherwise=False),
    )
    return Snapshot(
        job=job,
        now=NOW,
        pods=tuple(draw(a_pod(role, index, usual)) for role, index in view.wanted),
        children=frozenset(kind for kind, needed in NEEDED.items() if needed(view)),
        secret=MadeSecret(uid="secret-1", public_key="AA=="),
        progress=draw(st.none() | progress),
        progress_read=draw(past),
        step_seen=draw(st.none() | past),
        listening_since=draw(st.none() | past),
    )


def a_pod(role: Role, index: int, phase: Phase) -> st.SearchStrategy[PodView]:
    """One in the usual phase; seldom another one."""
    pod = PodView(
        name=pod_name("job", role, index),
        uid=f"uid-{role}-{index}",
        role=role,
        index=index,
        attempt=1,
        phase=phase,
        created=NOW - timedelta(seconds=150),
        ready=phase is Phase.RUNNING,
        scheduled=phase is not Phase.PENDING,
        finished=NOW if phase is Phase.SUCCEEDED else None,
        exit_code=0 if phase is Phase.SUCCEEDED else None,
        termination=Termination(done=phase is Phase.SUCCEEDED),
    )
    odd = st.builds(
        replace,
        st.just(pod),
        phase=st.sampled_from(Phase),
        ready=st.booleans(),
        deleting=st.booleans(),
        deletion_deadline=st.none() | recent,
        finished=st.none() | recent,
        exit_code=st.sampled_from((None, 0, 1, 75, 137)),
        reason=st.sampled_from(("", "Unschedulable")),
        conditions=st.sampled_from((frozenset[str](), frozenset({"DisruptionTarget"}))),
        disruption=st.sampled_from(("", "DeletionByTaintManager")),
        ready_since=st.none() | recent,
        silent_since=st.none() | past,
        trouble=st.none() | st.builds(Trouble, container=st.just("proxy"), words=st.just("fails"), since=recent),
    )
    return seldom(odd, otherwise=pod)


@pytest.mark.timeout(0 if WIDE else 120)
@given(
    whole_jobs() | st.lists(snapshots, min_size=2, max_size=2), st.booleans(), st.integers(0, 90), st.integers(0, 99)
)
@settings(
    max_examples=20_000 if WIDE else 200, deadline=None, derandomize=not WIDE, suppress_health_check=list(HealthCheck)
)
def test_time_alone_changes_nothing_before_the_plan_looks_again(
    views: list[Snapshot], suspend: bool, pause: int, percent: int
) -> None:
    """A pass costs a hundred times what a timer costs, so the operator makes one only when something happens or a moment has come."""
    job, now = views[0].job, NOW
    for view in views:
        job = looked_at_in_time(replace(view, job=job, now=now), percent)
        job = job.model_copy(update={"spec": job.spec.model_copy(update={"suspend": suspend and view is views[-2]})})
        now += timedelta(seconds=pause)


def looked_at_in_time(snapshot: Snapshot, percent: int) -> DistTrainJob:
    """The job after some passes."""
    for _ in range(PASSES):
        plan, before = decide(snapshot), snapshot.status
        pause, snapshot = look_again(snapshot, plan), with_status(snapshot, plan.status)
        if pause != timedelta(0):
            nothing_changes(snapshot, pause, percent)
        if before == plan.status:
            break
    return snapshot.job


def nothing_changes(snapshot: Snapshot, pause: timedelta | None, percent: int) -> None:
    """Within this time, a pass would do and write what one of now does."""
    now = decide(snapshot)
    end = pause or timedelta(days=1)
    for wait in (end * percent / 100, end - timedelta.resolution):
        later = decide(replace(snapshot, now=snapshot.now + wait))
        assert later.actions == now.actions
        if now.status == snapshot.status and not now.actions:  # an action makes another snapshot
            assert later.status == snapshot.status


def with_status(snapshot: Snapshot, status: DistTrainJobStatus) -> Snapshot:
    return replace(snapshot, job=snapshot.job.model_copy(update={"status": status}))


def comes_to_rest(snapshot: Snapshot) -> DistTrainJob:
    for _ in range(PASSES):
        plan = decide(snapshot)
        assert plan.look_again is None or plan.look_again >= timedelta(0)
        stored = DistTrainJobStatus.model_validate(plan.status.to_dict())
        assert stored == plan.status, "a status that reads back as another one is written for ever"
        if stored == snapshot.status:
            assert plan.events == (), "news without a change"
            return snapshot.job
        snapshot = with_status(snapshot, stored)
    raise AssertionError("the passes do not come to rest")
