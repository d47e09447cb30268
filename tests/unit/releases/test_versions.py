"""Two versions of the operator over the same jobs: an upgrade, a roll-back, a CRD that is applied before or after it.

The jobs of every release (jobs.py) are read as they are, and as another version could have stored them: with a field more at every level,
and with a value that this version does not know in every place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from disttrain.api.names import ChildKind, Role, pod_name
from disttrain.api.stored import ReadJob, read_stored
from disttrain.controller.status import status_patch
from disttrain.plan import Plan, Snapshot, decide
from disttrain.plan.model import CreatePod, DeletePod, Phase, PodView
from unit.controller.test_status import applied
from unit.releases.jobs import load, stored

RELEASED = load()
NEWEST = stored()
JOBS = {**RELEASED, **{name: body for name, body in NEWEST.items() if body not in RELEASED.values()}}
"""Those of today's version only where they differ from what is kept of it."""
NOW = datetime(2026, 1, 1, 12, 2, 10, tzinfo=UTC)
STRANGE = "Unheard-of"
FINAL = ("Complete", "Failed")
EACH_STORED_JOB = pytest.mark.parametrize("name", JOBS)


@dataclass
class Pass:
    """One pass over a stored job."""

    body: dict[str, Any]
    read: ReadJob
    plan: Plan

    @property
    def patch(self) -> dict[str, Any]:
        old = self.read.job.status.to_dict()
        return status_patch(self.body["status"], old, self.plan.status.to_dict())

    @property
    def after(self) -> dict[str, Any]:
        """The status that the API server has then."""
        status: dict[str, Any] = applied(self.body["status"], self.patch)
        return status


def look(body: dict[str, Any], like: dict[str, Any]) -> Pass:
    """A pass over a job, whose pods are those of `like`: all of them run, or none when the job is not running."""
    read = read_stored(copy.deepcopy(body))
    status = like["status"]
    gone = like["spec"]["suspend"] or not status or ends(like)
    spec = read_stored(copy.deepcopy(like)).job.spec
    servers = spec.parameter_server.replicas if spec.parameter_server else 0
    places = {Role.MASTER: 1, Role.PARAMETER_SERVER: servers, Role.WORKER: spec.worker.replicas}
    pods = tuple(
        PodView(
            name=pod_name("digits", role, index),
            uid=f"{role}-{index}",
            role=role,
            index=index,
            attempt=status.get("attempt", 1),
            phase=Phase.RUNNING,
            created=NOW - timedelta(minutes=2),
            ready=True,
            ready_since=NOW - timedelta(minutes=1),
            scheduled=True,
            node="node-1",
        )
        for role, count in places.items()
        for index in range(0 if gone else count)
    )
    snapshot = Snapshot(
        job=read.job,
        now=NOW,
        pods=pods,
        children=frozenset((ChildKind.SERVICE, ChildKind.NETWORK_POLICY) if status else ()),
        listening_since=NOW,
        not_understood=read.not_understood,
    )
    return Pass(body, read, decide(snapshot))


def ends(body: dict[str, Any]) -> bool:
    return body["status"].get("state") in FINAL


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every object, list and scalar below, with its path; of free-form objects nothing: they are the user's."""
    yield path, value
    if isinstance(value, dict) and path[-1:] not in (("config",), ("template",)):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def changed(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value in one place."""
    result = copy.deepcopy(body)
    holder = result
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    return result


def with_siblings(body: dict[str, Any], part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The job with a field of another version, once in each object of a part."""
    for path, value in list(places(body[part], (part,))):
        if isinstance(value, dict) and path[-1] not in ("config", "evaluation"):
            for strange in (STRANGE, {"nested": [1, 2]}, None):
                if strange is not None or part == "spec":  # no status holds a null
                    yield ".".join(map(str, path)), changed(body, (*path, "newField"), strange)


def with_strange_values(body: dict[str, Any], part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The job with a value that no version has written, once in each place of a part."""
    for path, value in list(places(body[part], (part,))):
        if len(path) > 1:
            for strange in (STRANGE, {"now": "an object"}, -7.25):
                if type(strange) is not type(value) or strange == STRANGE:
                    yield f"{'.'.join(map(str, path))} = {strange}", changed(body, path, strange)


def lost(before: Any, after: Any, path: str = "status") -> list[str]:
    """Fields that were there and are not any more."""
    if isinstance(before, dict):
        if not isinstance(after, dict):
            return [path]
        return [each for key in before for each in (lost(before[key], after.get(key), f"{path}.{key}"))]
    return [path] if after is None and before is not None else []


def holds(value: Any, stored: Any) -> bool:
    """Whether all that is stored was read: a decimal of 0.1.0, a string, as a number; what a later release added has its default."""
    if isinstance(stored, dict):
        return isinstance(value, dict) and all(key in value and holds(value[key], stored[key]) for key in stored)
    if isinstance(stored, list):
        return isinstance(value, list) and len(value) == len(stored) and all(map(holds, value, stored))
    return bool(value == (float(stored) if isinstance(value, float) else stored))


@EACH_STORED_JOB
def test_job_of_every_release_is_understood_in_full_and_stored_as_it_was(name: str) -> None:
    body = JOBS[name]
    read = read_stored(copy.deepcopy(body))
    assert (read.unknown, read.not_understood) == ((), ())
    assert holds(read.job.status.to_dict(), body["status"])


@EACH_STORED_JOB
def test_upgrade_leaves_every_job_as_it_is(name: str) -> None:
    body = JOBS[name]
    one = look(body, body)
    if not body["status"]:
        assert any(isinstance(action, CreatePod) for action in one.plan.actions), "a new job is begun"
        return
    assert one.plan.actions == ()
    kept = {field: body["status"].get(field) for field in ("attempt", "startTime", "completionTime", "restarts")}
    assert {field: one.after.get(field) for field in kept} == kept


@pytest.mark.parametrize("part", ["spec", "status"])
@EACH_STORED_JOB
def test_field_of_another_version_changes_nothing(name: str, part: str) -> None:
    body = JOBS[name]
    expected = look(body, body)
    for place, other in with_siblings(body, part):
        one = look(other, body)
        assert one.read.not_understood == (), place
        assert one.plan == expected.plan, place
        assert one.read.unknown, place
        assert lost(other["status"], one.after) == [], place


@pytest.mark.parametrize("part", ["spec", "status"])
@EACH_STORED_JOB
def test_value_of_another_version_never_costs_a_job_its_pods_or_its_account(name: str, part: str) -> None:
    body = JOBS[name]
    for place, other in with_strange_values(body, part):
        one = look(other, body)
        if body["status"] or one.read.not_understood:
            assert not any(isinstance(action, CreatePod | DeletePod) for action in one.plan.actions), place
        unchanged = {field: other["status"].get(field) for field in ("attempt", "completionTime", "restarts")}
        after = {field: one.after.get(field) for field in unchanged}
        assert after == unchanged or not body["status"], place
        if one.read.not_understood and not ends(body):
            assert lost(other["status"], one.after) == [], place
            said = "'InvalidSpec'" in str(one.after.get("conditions"))
            assert said or not isinstance(other["status"].get("conditions", []), list), place
        if ends(body):
            assert one.plan.status.completion_time or one.read.not_understood, place
            assert not one.plan.events or one.read.not_understood, place


@pytest.mark.parametrize("name", [name for name, body in JOBS.items() if ends(body)])
def test_finished_job_with_any_spec_of_another_version_is_a_finished_one_for_ever(name: str) -> None:
    body = JOBS[name]
    for place, other in (*with_siblings(body, "spec"), *with_strange_values(body, "spec")):
        one = look(other, body)
        assert one.patch == {}, place
        assert one.plan.actions == (), place


@EACH_STORED_JOB
def test_passes_over_what_another_version_stored_come_to_rest(name: str) -> None:
    body = JOBS[name]
    for part in ("spec", "status"):
        for place, other in [*with_siblings(body, part), *with_strange_values(body, part)][::5]:
            one = look(other, body)
            for _ in range(4):
                if not one.patch:
                    break
                one = look({**other, "status": one.after}, body)
            assert one.patch == {}, place


def test_unknown_state_reason_and_condition_of_a_running_job_stop_nothing() -> None:
    body = copy.deepcopy(NEWEST["running"])
    body["status"]["state"] = "Resharding"
    elastic = {
        "type": "Elastic",
        "status": "True",
        "reason": "Grown",
        "lastTransitionTime": "2026-01-01T12:00:00Z",
        "shape": [4, 2],
    }
    body["status"]["conditions"].insert(0, elastic)
    body["status"]["conditions"][3]["reason"] = "WarmedUp"
    one = look(body, body)
    assert one.read.not_understood == ()
    assert one.plan.actions == ()
    assert elastic in one.after["conditions"]
    assert one.after["state"] == "Training"


def test_decimals_that_an_earlier_version_stored_as_strings_are_read_and_written_as_numbers_when_they_change() -> None:
    body = copy.deepcopy(NEWEST["running"])
    body["spec"]["trainer"]["optimizer"] = {"name": "SGD", "learningRate": "1e-05", "momentum": "0.9"}
    evaluation = {"accuracy": "0.9", "perplexity": "inf", "gain": "-0.5"}
    body["status"]["training"] |= {"loss": "0.1834", "samplesPerSecond": "5120", "evaluation": evaluation}
    read = read_stored(body)
    assert read.not_understood == ()
    optimizer, training = read.job.spec.trainer.optimizer, read.job.status.training
    assert optimizer
    assert training
    assert (optimizer.learning_rate, optimizer.momentum) == (1e-05, 0.9)
    understood = {"accuracy": 0.9, "gain": -0.5}
    assert (training.loss, training.samples_per_second, training.evaluation) == (0.1834, 5120, understood)
    old = read.job.status.to_dict()
    new = copy.deepcopy(old)
    assert status_patch(body["status"], old, new) == {}
    new["training"] |= {"loss": 0.25, "evaluation": {**understood, "perplexity": 7.5}}
    assert status_patch(body["status"], old, new) == {"training": {"loss": 0.25, "evaluation": {"perplexity": 7.5}}}


def test_what_is_not_understood_is_named_with_its_place_and_its_value() -> None:
    body = changed(NEWEST["running"], ("spec", "strategy", "type"), "Swarm")
    body = changed(body, ("spec", "failurePolicy", "rules", 0, "action"), "Migrate")
    (first, second) = read_stored(body).not_understood
    assert first.startswith("spec.strategy.type: Input should be 'DataParallel', ")
    assert first.endswith("(got 'Swarm')")
    assert second.startswith("spec.failurePolicy.rules.again.action: ")


def test_corpus_holds_every_field_of_the_status() -> None:
    """A field that is in no stored job would not be tried above."""
    from disttrain.api.status import DistTrainJobStatus

    found = {path[-1] for body in NEWEST.values() for path, _ in places(body["status"], ("status",))}
    assert {info.alias for info in DistTrainJobStatus.model_fields.values()} <= found
