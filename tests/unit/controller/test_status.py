"""What of a status is sent, and when it may wait."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.controller.status import REFUSED_SECONDS, delay, merge_patch, status_patch, steps, trim
from disttrain.kube.api import JOBS, PODS, Body, Refused, Resource
from disttrain.plan.model import Write
from unit.controller.fake_api import JOB, PODS_OF_JOB, ApiServer, job
from unit.controller.fake_cluster import eventually, operated
from unit.controller.hand_turned import hand_turned

JSON = st.recursive(
    st.integers() | st.text(max_size=3) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=2), JSON, max_size=4)


def applied(target: Any, patch: Any) -> Any:
    """RFC 7386, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = applied(result.get(key), value)
    return result


@given(OBJECTS, OBJECTS)
def test_patch_makes_the_new_of_the_old(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert applied(old, merge_patch(old, new)) == new


@given(OBJECTS)
def test_equal_objects_need_no_patch(same: dict[str, Any]) -> None:
    assert merge_patch(same, same) == {}


@pytest.mark.parametrize(
    ("write", "latency", "seconds"),
    [
        pytest.param(Write.NOW, 9.0, 0.0, id="what is urgent never waits"),
        pytest.param(Write.BEGINNING, 0.005, 0.15, id="a beginning"),
        pytest.param(Write.BEGINNING, 0.1, 3.0, id="a beginning among many"),
        pytest.param(Write.SOON, 0.01, 2.0, id="the setting as it is"),
        pytest.param(Write.SOON, 0.1, 3.0, id="requests that take long"),
        pytest.param(Write.SOON, 9.0, 6.0, id="not without an end"),
        pytest.param(Write.PROGRESS, 0.0, 2.0, id="progress in a job's turn"),
        pytest.param(Write.WITH_NEXT, 0.0, 6.0, id="a small change"),
    ],
)
def test_slow_requests_make_writes_rarer(write: Write, latency: float, seconds: float) -> None:
    assert delay(write, 2.0, latency=latency) == pytest.approx(seconds)


def test_what_was_not_understood_of_a_status_stays_in_it() -> None:
    stored = {
        "state": "Resharding",
        "lastEvent": {"a": 1},
        "training": {"step": 1, "loss": 1.0, "shape": [4]},
        "conditions": [
            {"type": "Ready", "status": "False", "severity": "high"},
            {"type": "Elastic", "status": "Maybe"},
            7,
        ],
        "goodput": "much",
    }
    old = {"training": {"step": 1, "loss": 1.0}, "conditions": [{"type": "Ready", "status": "False"}]}
    new = {
        "training": {"step": 2},
        "conditions": [{"type": "Ready", "status": "True"}, {"type": "Valid", "status": "True"}],
        "goodput": {"productiveSeconds": 5},
    }
    assert status_patch(stored, old, new) == {
        "training": {"step": 2, "loss": None},
        "conditions": [
            {"type": "Ready", "status": "True", "severity": "high"},
            {"type": "Valid", "status": "True"},
            {"type": "Elastic", "status": "Maybe"},
            7,
        ],
    }


def test_object_that_goes_takes_only_what_was_understood_with_it() -> None:
    stored = {"training": {"step": 1, "shape": [4]}}
    assert status_patch(stored, {"training": {"step": 1}}, {}) == {"training": {"step": None}}
    assert status_patch({"training": {"step": 1}}, {"training": {"step": 1}}, {}) == {"training": None}


@pytest.mark.parametrize(
    ("field", "left"),
    [
        pytest.param("state", {"training": {"step": 1, "loss": 0.5}, "conditions": [{"type": "A", "x": "y"}]}, id="field"),
        pytest.param(
            "training.loss",
            {"state": "S", "training": {"step": 1, "loss": "0.5"}, "conditions": [{"type": "A", "x": "y"}]},
            id="number, which is a decimal string in an earlier schema",
        ),
        pytest.param("training", {"state": "S", "conditions": [{"type": "A", "x": "y"}]}, id="object"),
        pytest.param(
            "conditions[0].x",
            {"state": "S", "training": {"step": 1, "loss": 0.5}, "conditions": [{"type": "A"}]},
            id="field of an entry",
        ),
    ],
)  # fmt: skip
def test_refused_field_is_left_out_of_a_patch(field: str, left: dict[str, Any]) -> None:
    patch = {"state": "S", "training": {"step": 1, "loss": 0.5}, "conditions": [{"type": "A", "x": "y"}]}
    assert trim(patch, steps(field)) == left


@hand_turned
async def test_status_of_which_the_schema_of_another_version_refuses_a_part_is_written_without_it() -> None:
    class Newer(ApiServer):
        refusals = 0

        async def patch_status(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
            if "goodput" in patch["status"]:
                self.refusals += 1
                raise Refused(422, "Invalid", "goodput must be a list", fields=("status.goodput",))
            return await super().patch_status(resource, namespace, name, patch)

    async with operated(server=Newer()) as (server, _):
        assert isinstance(server, Newer)
        server.run(*PODS_OF_JOB)
        await eventually(lambda: server.condition("Scheduled")[0] == "True")
        uid = server.uid(PODS, "digits-worker-1")
        server.fail("digits-worker-1")
        server.objects[PODS, "digits-worker-1"]["spec"]["terminationGracePeriodSeconds"] = 0
        await eventually(
            lambda: "digits-worker-1" in server.names() and server.uid(PODS, "digits-worker-1") != uid, seconds=20
        )
        assert server.status["restarts"]["total"] == 1
        assert "goodput" not in server.status
        assert server.refusals <= 1 + (REFUSED_SECONDS < 60)


@hand_turned
async def test_status_that_is_refused_as_a_whole_is_tried_again_and_no_part_of_it_is_lost() -> None:
    async with operated(started=False) as (server, _):
        server.fault = lambda verb, *_: Refused(422, "Invalid", "no") if verb == "patch" else None
        server.put(JOBS, job())
        await eventually(lambda: server.names() == PODS_OF_JOB)
        server.fault = lambda *_: None
        await eventually(lambda: server.status.get("startTime"), seconds=70)
        assert server.objects[JOBS, JOB.name]["status"]["attempt"] == 1
