"""What nothing takes back is done only after one live look, and a second decision that says the same."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from disttrain.api.names import LABEL_JOB_NAME
from disttrain.controller.cache import Known
from disttrain.kube.api import JOBS, PODS, Body, Resource, Unavailable
from unit.controller.fake_api import JOB, PODS_OF_JOB, ApiServer, job, stamp
from unit.controller.fake_cluster import Operator, eventually, operated
from unit.controller.hand_turned import hand_turned

DEADLINE = {"runPolicy": {"startupDeadlineSeconds": 120}}


def mute(server: ApiServer, operator: Operator, *kinds: Resource) -> None:
    """The watches of these kinds tell nothing any more."""

    def tell(resource: Resource, event: dict[str, Any]) -> None:
        if resource not in kinds:
            operator.intake.take(resource, event)

    server.tell = tell


def looks(server: ApiServer) -> list[float]:
    return server.asked("list", PODS)


@hand_turned
async def test_job_is_not_failed_by_its_deadline_while_the_watch_is_mute_and_its_pods_are_ready() -> None:
    async with operated(job(**DEADLINE)) as (server, operator):
        mute(server, operator, PODS)
        server.run(*PODS_OF_JOB)
        await asyncio.sleep(300)
        assert server.condition("Failed")[0] == "False"
        assert server.condition("Scheduled")[0] == "True"


@hand_turned
async def test_job_whose_pods_are_not_ready_is_failed_after_one_look() -> None:
    async with operated(job(**DEADLINE)) as (server, _):
        await eventually(lambda: server.condition("Failed")[0] == "True", seconds=300)
        assert len(looks(server)) == 1


@hand_turned
async def test_status_of_a_job_that_fails_has_the_checkpoint_that_its_master_knows_at_that_moment() -> None:
    async with operated(job()) as (server, operator):
        looked: list[str] = []

        async def look(key: Any) -> None:
            looked.append(server.condition("Failed")[0])

        operator.progress.look = look  # type: ignore[method-assign]
        server.run(*PODS_OF_JOB)
        await eventually(lambda: server.condition("Scheduled")[0] == "True")
        server.fail("digits-worker-0", code=1)
        await eventually(lambda: server.condition("Failed")[0] == "True")
        assert looked == ["False"]


@hand_turned
async def test_job_is_not_failed_while_no_live_look_is_to_be_had() -> None:
    async with operated(job(**DEADLINE)) as (server, _):
        server.fault = lambda verb, *_: Unavailable(503, "ServiceUnavailable", "later") if verb == "list" else None
        await asyncio.sleep(400)
        assert server.condition("Failed")[0] == "False"
        server.fault = lambda *_: None
        await eventually(lambda: server.condition("Failed")[0] == "True", seconds=130)


@hand_turned
async def test_live_look_at_less_than_was_seen_ends_the_operator_and_not_the_job() -> None:
    async with operated(job(**DEADLINE)) as (server, operator):
        operator.cache.pods.known = Known(newest=1_000_000, deletions=0)
        await eventually(lambda: operator.restored, seconds=300)
        assert server.condition("Failed")[0] == "False"


@hand_turned
async def test_command_is_not_restarted_for_a_worker_that_is_there_after_all() -> None:
    command = job(trainer={"command": ["python", "-m", "mine"]})
    async with operated(command) as (server, operator):
        server.run(*PODS_OF_JOB)
        await eventually(lambda: server.condition("Scheduled")[0] == "True")
        # An old event from a watch that was restarted: the worker is not of this attempt's labels any more, so it is not seen.
        blind = server.objects[PODS, "digits-worker-0"]
        old = {**blind, "metadata": {**blind["metadata"], "resourceVersion": "90000"}}
        old["metadata"]["labels"] = {**old["metadata"]["labels"], "disttrain.dev/index": "7"}
        mute(server, operator, PODS)
        server.versions = iter(range(100_000, 200_000))
        server.change(PODS, "digits-worker-0", lambda body: body["status"].update(podIP="10.0.0.2"))
        operator.intake.take(PODS, {"type": "MODIFIED", "object": old})
        await asyncio.sleep(30)
        assert server.status["attempt"] == 1


@hand_turned
async def test_job_whose_ttl_was_raised_a_moment_ago_is_not_deleted() -> None:
    async with operated(job(runPolicy={"ttlSecondsAfterFinished": 60, "startupDeadlineSeconds": 60})) as (
        server,
        operator,
    ):
        await eventually(lambda: server.condition("Failed")[0] == "True", seconds=200)
        mute(server, operator, JOBS)

        def later(body: Body) -> None:
            body["spec"]["runPolicy"]["ttlSecondsAfterFinished"] = 3600
            body["metadata"]["generation"] = 2

        server.change(JOBS, JOB.name, later)
        await asyncio.sleep(600)
        assert server.names(JOBS) == [JOB.name]


@hand_turned
async def test_job_that_is_gone_when_its_ttl_is_over_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with operated(job(runPolicy={"ttlSecondsAfterFinished": 60, "startupDeadlineSeconds": 60})) as (
        server,
        operator,
    ):
        await eventually(lambda: server.condition("Failed")[0] == "True", seconds=200)
        mute(server, operator, JOBS)
        server.remove(JOBS, JOB.name)
        await asyncio.sleep(120)
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
        assert operator.cache.jobs.get(JOB) is None


@hand_turned
async def test_pod_of_a_lost_node_that_is_gone_by_now_is_not_deleted_by_force() -> None:
    async with operated() as (server, operator):
        server.run(*PODS_OF_JOB)
        await eventually(lambda: server.condition("Scheduled")[0] == "True")
        taint = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
        uid = server.uid(PODS, "digits-worker-0")

        def lost(body: Body) -> None:
            body["status"]["conditions"].append({**taint, "lastTransitionTime": stamp()})
            body["metadata"] |= {"deletionTimestamp": stamp(), "deletionGracePeriodSeconds": 30}

        server.change(PODS, "digits-worker-0", lost)
        await asyncio.sleep(1)
        mute(server, operator, PODS)
        server.remove(PODS, "digits-worker-0")
        await eventually(lambda: server.objects.get((PODS, "digits-worker-0")), seconds=200)
        assert server.asked("delete", PODS) == []
        assert server.uid(PODS, "digits-worker-0") != uid


@pytest.fixture(autouse=True)
def _selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look is about the pods of one job."""
    listed = ApiServer.list

    async def checked(self: ApiServer, resource: Resource, namespace: str | None, **chosen: str) -> Any:
        assert resource is not PODS or chosen["selector"] == f"{LABEL_JOB_NAME}={JOB.name}"
        async for page in listed(self, resource, namespace, **chosen):
            yield page

    monkeypatch.setattr(ApiServer, "list", checked)
