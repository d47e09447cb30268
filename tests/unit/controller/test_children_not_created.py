"""What the API server does not let the operator do: the job says so, its clocks run, and it is tried again."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from disttrain.api.names import API_VERSION, KIND
from disttrain.controller import apply
from disttrain.controller.record import Child
from disttrain.kube.api import (
    JOBS,
    NETWORK_POLICIES,
    PODS,
    SERVICES,
    ApiError,
    Conflict,
    Refused,
    Resource,
    Unavailable,
)
from unit.controller.fake_api import JOB, PODS_OF_JOB, job
from unit.controller.fake_cluster import eventually, operated
from unit.controller.hand_turned import hand_turned, now

WEBHOOK = 'Internal error occurred: failed calling webhook "pods.example.org": connection refused'


def down(verb: str, resource: Resource, name: str) -> ApiError | None:
    """An admission webhook for pods that is down."""
    return Unavailable(500, "InternalError", WEBHOOK) if (verb, resource) == ("create", PODS) else None


def healthy(*_: object) -> None:
    return None


def refusing(code: int, *resources: Resource) -> Any:
    def fault(verb: str, resource: Resource, name: str) -> ApiError | None:
        wrong = verb == "create" and resource in (resources or (PODS,))
        return Refused(code, "Invalid", f"{name} is not liked") if wrong else None

    return fault


@hand_turned
async def test_job_whose_pods_cannot_be_made_has_a_status_and_its_deadline_runs() -> None:
    async with operated(started=False) as (server, _):
        server.fault = down
        server.put(JOBS, job(runPolicy={"startupDeadlineSeconds": 60}))
        await eventually(lambda: server.status.get("startTime") and server.status.get("state"), seconds=1)
        await eventually(lambda: server.condition("Failed")[:2] == ("True", "StartupDeadlineExceeded"), seconds=130)


@hand_turned
async def test_server_error_that_lasts_is_reported_and_tried_again_and_forgotten_when_it_is_over() -> None:
    async with operated(started=False) as (server, _):
        server.fault = down
        server.put(JOBS, job())
        await eventually(lambda: server.condition("Scheduled")[1] == "PodRefused", seconds=15)
        assert server.condition("Scheduled")[2] == f"Pod digits-master-0: {WEBHOOK}"
        server.fault = healthy
        await eventually(lambda: server.names() == PODS_OF_JOB, seconds=15)
        server.run(*PODS_OF_JOB)
        await eventually(lambda: server.condition("Scheduled")[0] == "True")


@hand_turned
async def test_server_error_of_a_moment_is_no_refusal() -> None:
    async with operated(started=False) as (server, _):
        server.fault = down
        server.put(JOBS, job())
        await asyncio.sleep(1)
        server.fault = healthy
        assert await eventually(lambda: server.names() == PODS_OF_JOB) < 3
        assert "PodRefused" not in str(server.status)


@hand_turned
async def test_what_the_server_cannot_do_is_asked_for_after_pauses_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "SERVER_ERROR_SECONDS", 3600.0)
    async with operated(started=False) as (server, _):
        server.fault = down
        server.put(JOBS, job())
        await asyncio.sleep(60)
        pauses = [later - earlier for earlier, later in pairwise(server.asked("create", PODS, "digits-master-0"))]
        assert len(pauses) < 12
        assert pauses[-1] > 10


@hand_turned
async def test_server_that_wants_to_be_left_alone_is_asked_for_nothing_until_then() -> None:
    async with operated(started=False) as (server, _):
        server.fault = lambda verb, *_: Unavailable(429, "TooManyRequests", "too many", 5) if verb == "create" else None
        server.put(JOBS, job())
        await asyncio.sleep(4)
        # The start is written all the same: every deadline counts from it.
        assert [verb for _, verb, *_ in server.requests] == ["create"] * 4 + ["patch"]


@pytest.mark.parametrize("code", [429, 500])
@hand_turned
async def test_deadlines_run_while_a_server_wants_to_be_left_alone(code: int) -> None:
    async with operated(started=False) as (server, _):
        server.fault = lambda verb, resource, _: (
            Unavailable(code, "Busy", "limit", 5) if (verb, resource) == ("create", PODS) else None
        )
        server.put(JOBS, job(runPolicy={"startupDeadlineSeconds": 60}))
        await eventually(lambda: server.condition("Failed")[:2] == ("True", "StartupDeadlineExceeded"), seconds=120)


@hand_turned
async def test_name_that_the_job_does_not_need_any_more_stops_nothing() -> None:
    async with operated(started=False) as (server, _):
        server.put(NETWORK_POLICIES, {"metadata": {"name": JOB.name}, "spec": {}})
        server.put(JOBS, job(network={"policy": "JobOnly"}))
        await eventually(lambda: server.condition("Valid")[1] == "NameTaken", seconds=30)

        def edit(body: dict[str, Any]) -> None:
            body["spec"]["network"] = {"policy": "None"}
            body["metadata"]["generation"] = 2

        server.change(JOBS, JOB.name, edit)
        await eventually(lambda: server.names() == PODS_OF_JOB, seconds=30)


@hand_turned
async def test_deletion_that_a_policy_forbids_keeps_no_status_back() -> None:
    async with operated() as (server, _):
        server.run(*PODS_OF_JOB)
        await eventually(lambda: server.condition("Ready")[1] == "WaitingForPeers")
        server.fault = lambda verb, *_: Refused(403, "Forbidden", "by policy") if verb == "delete" else None
        server.change(JOBS, JOB.name, lambda body: body["spec"].update(suspend=True))
        await eventually(lambda: server.condition("Suspended")[1] == "Suspending", seconds=5)
        server.fault = healthy
        await eventually(
            lambda: all("deletionTimestamp" in server.objects[PODS, name]["metadata"] for name in PODS_OF_JOB),
            seconds=61,
        )


@hand_turned
async def test_pod_whose_deletion_meets_a_conflict_is_not_taken_for_gone() -> None:
    """A webhook may answer so, too. Only another object of that name shows that the pod is gone."""
    async with operated() as (server, _):
        server.run(*PODS_OF_JOB)
        await eventually(lambda: server.condition("Ready")[1] == "WaitingForPeers")
        server.fault = lambda verb, *_: Conflict(409, "Conflict", "by a webhook") if verb == "delete" else None
        server.change(JOBS, JOB.name, lambda body: body["spec"].update(suspend=True))
        await eventually(lambda: server.asked("delete", PODS), seconds=5)
        server.fault = healthy
        await eventually(
            lambda: all("deletionTimestamp" in server.objects[PODS, name]["metadata"] for name in PODS_OF_JOB),
            seconds=30,
        )


@pytest.mark.parametrize("code", [400, 422])
@hand_turned
async def test_object_that_is_wrong_in_itself_makes_the_job_invalid(code: int) -> None:
    async with operated(started=False) as (server, _):
        server.fault = refusing(code)
        server.put(JOBS, job())
        await eventually(lambda: server.condition("Valid")[:2] == ("False", "PodRefused"), seconds=5)
        assert "Pod digits-master-0 could not be created: digits-master-0 is not liked" in server.condition("Valid")[2]
        server.fault = healthy  # an administrator lifts the policy that was the cause
        await eventually(lambda: server.names() == PODS_OF_JOB, seconds=65)
        await eventually(lambda: server.condition("Valid")[0] == "True")


@hand_turned
async def test_refusal_of_one_kind_outlives_the_success_of_another_that_has_its_name() -> None:
    async with operated(started=False) as (server, operator):
        server.fault = refusing(403, NETWORK_POLICIES)
        server.put(JOBS, job())
        await eventually(lambda: server.condition("Scheduled")[1] == "PodRefused", seconds=5)
        assert server.names(SERVICES) == ["digits"]
        assert server.condition("Scheduled")[2].startswith("NetworkPolicy digits: ")
        record = operator.records.find(JOB)
        assert record
        assert list(record.refusals) == [Child(NETWORK_POLICIES, JOB)]
        server.fault = healthy
        await eventually(lambda: server.names() == PODS_OF_JOB, seconds=15)
        assert record.refusals == {}


@hand_turned
async def test_refused_child_that_was_made_all_the_same_stops_nothing_any_more() -> None:
    async with operated(started=False) as (server, operator):

        def times_out(verb: str, resource: Resource, name: str) -> ApiError | None:
            if (verb, name) != ("create", "digits-worker-1"):
                return None
            if now() > 1020 and name not in server.names():  # the write is done, and its answer does not come
                pod = server.objects[PODS, "digits-worker-0"]
                labels = {**pod["metadata"]["labels"], "disttrain.dev/index": "1"}
                server.put(PODS, {**pod, "metadata": {**pod["metadata"], "name": name, "labels": labels}})
            return Unavailable(504, "Timeout", "etcdserver: request timed out")

        server.fault = times_out
        server.put(JOBS, job())
        await eventually(lambda: "timed out" in server.condition("Scheduled")[2], seconds=15)
        await eventually(lambda: server.names() == PODS_OF_JOB)
        record = operator.records.find(JOB)
        assert record
        await eventually(lambda: record.refusals == {}, seconds=2)
        assert record.server_errors == {}


@hand_turned
async def test_template_that_cannot_be_merged_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("mountPath")

    monkeypatch.setattr(apply, "build_pod", broken)
    async with operated(started=False) as (server, _):
        server.put(JOBS, job())
        await eventually(lambda: server.condition("Valid")[:2] == ("False", "PodRefused"), seconds=5)
        message = server.condition("Valid")[2]
        assert message.startswith(
            "Pod digits-master-0 could not be created: the operator cannot build it from its template: KeyError"
        )
        assert "\n" not in message
        assert server.condition("Scheduled")[0] == "False"


@hand_turned
async def test_creations_after_a_refused_batch_are_not_begun(recwarn: pytest.WarningsRecorder) -> None:
    async with operated(started=False) as (server, _):
        server.fault = refusing(403)
        server.put(JOBS, job(worker={"replicas": 40}))
        await eventually(lambda: server.condition("Scheduled")[1] == "PodRefused", seconds=5)
        assert len(server.asked("create", PODS)) <= 4
    assert [str(warning.message) for warning in recwarn if "never awaited" in str(warning.message)] == []


@hand_turned
async def test_pod_that_lost_its_label_is_deleted_and_made_again() -> None:
    async with operated() as (server, _):
        uid = server.uid(PODS, "digits-worker-0")
        server.run(*PODS_OF_JOB)
        await asyncio.sleep(5)
        server.change(PODS, "digits-worker-0", lambda body: body["metadata"]["labels"].clear())
        await eventually(lambda: "deletionTimestamp" in server.objects[PODS, "digits-worker-0"]["metadata"], seconds=5)
        await eventually(lambda: "without the labels" in server.condition("Scheduled")[2], seconds=5)
        began = now()
        await asyncio.sleep(30)  # its grace period, in which it is asked for again from time to time
        assert len(server.asked("create", PODS, "digits-worker-0")) <= 6
        assert len(server.asked("delete", PODS, "digits-worker-0")) == 1
        server.remove(PODS, "digits-worker-0")
        await eventually(lambda: server.names() == PODS_OF_JOB and server.uid(PODS, "digits-worker-0") != uid)
        assert now() - began < 45
        await eventually(lambda: "without the labels" not in str(server.status), seconds=20)


@pytest.mark.parametrize(
    ("label", "value"),
    [
        pytest.param("disttrain.dev/index", "many", id="no number"),
        pytest.param("disttrain.dev/index", "1", id="that of another"),
    ],
)
@hand_turned
async def test_pod_whose_labels_are_wrong_is_made_again(label: str, value: str) -> None:
    async with operated() as (server, _):
        uid = server.uid(PODS, "digits-worker-0")
        server.change(PODS, "digits-worker-0", lambda body: body["metadata"]["labels"].update({label: value}))
        await eventually(lambda: server.names() == PODS_OF_JOB and server.uid(PODS, "digits-worker-0") != uid)
        assert server.objects[PODS, "digits-worker-0"]["metadata"]["labels"]["disttrain.dev/index"] == "0"


@pytest.mark.parametrize("resource", [SERVICES, NETWORK_POLICIES], ids=lambda resource: resource.kind)
@hand_turned
async def test_other_child_that_lost_its_label_is_made_again(resource: Resource) -> None:
    async with operated() as (server, _):
        uid = server.uid(resource, "digits")
        server.change(resource, "digits", lambda body: body["metadata"]["labels"].clear())
        await eventually(lambda: "digits" in server.names(resource) and server.uid(resource, "digits") != uid)
        requests = len(server.requests)
        await asyncio.sleep(30)
        assert len(server.requests) - requests < 5


@hand_turned
async def test_what_a_former_job_of_the_same_name_left_is_waited_for() -> None:
    async with operated(started=False) as (server, _):
        former = {"apiVersion": API_VERSION, "kind": KIND, "name": "digits", "uid": "former-uid", "controller": True}
        for resource, name in ((SERVICES, "digits"), (PODS, "digits-worker-0"), (PODS, "digits-worker-1")):
            server.put(resource, {"metadata": {"name": name, "ownerReferences": [former]}, "spec": {}})
        server.put(JOBS, job())
        await eventually(lambda: server.condition("Scheduled")[1] == "FormerJobEnds", seconds=5)
        assert server.condition("Valid")[:2] == ("True", "Accepted")
        await asyncio.sleep(30)
        server.remove(SERVICES, "digits")
        server.remove(PODS, "digits-worker-0")
        await asyncio.sleep(30)
        assert server.condition("Scheduled")[1] == "FormerJobEnds"
        server.remove(PODS, "digits-worker-1")
        await eventually(lambda: server.names() == PODS_OF_JOB)


@hand_turned
async def test_names_of_two_kinds_that_others_hold_are_given_back_one_by_one() -> None:
    async with operated(started=False) as (server, _):
        for resource in (SERVICES, NETWORK_POLICIES):
            server.put(resource, {"metadata": {"name": "digits"}, "spec": {}})
        server.put(JOBS, job())
        await eventually(lambda: server.condition("Valid")[1] == "NameTaken", seconds=5)
        server.remove(SERVICES, "digits")
        await asyncio.sleep(30)
        assert server.condition("Valid")[1] == "NameTaken"
        server.remove(NETWORK_POLICIES, "digits")
        await eventually(lambda: server.names() == PODS_OF_JOB)


@hand_turned
async def test_pods_that_could_not_be_made_were_not_taken_away() -> None:
    async with operated() as (server, _):
        server.run(*PODS_OF_JOB)
        await eventually(lambda: server.condition("Scheduled")[0] == "True")
        server.fault = down
        server.remove(PODS, "digits-worker-1")
        await asyncio.sleep(4)
        server.fault = healthy
        await eventually(lambda: "digits-worker-1" in server.names(), seconds=2)
        assert server.status["disruptions"]["inARow"] == 1
