"""When a pass comes: what follows from our own writes, and from the clock, waits for no watch and for no resync."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from disttrain import plan
from disttrain.api import Progress
from disttrain.controller import reconcile
from disttrain.controller.expectations import EVENT_DEADLINE
from disttrain.controller.progress import Unreadable
from disttrain.controller.volume_failures import MOUNT_SECONDS
from disttrain.kube.api import EVENTS, JOBS, PODS, Body, Refused, Resource, Unavailable
from disttrain.plan import Plan, Snapshot
from unit.controller.fake_api import JOB, PODS_OF_JOB, ApiServer, clock, job
from unit.controller.fake_cluster import Operator, eventually, operated
from unit.controller.hand_turned import hand_turned, now

LATE = EVENT_DEADLINE.total_seconds()


async def ready(server: ApiServer) -> None:
    server.run(*PODS_OF_JOB)
    await eventually(lambda: server.condition("Scheduled")[0] == "True")


@hand_turned
async def test_pod_that_is_gone_with_the_answer_to_its_deletion_is_replaced_at_once() -> None:
    async with operated(job(observability={"statusIntervalSeconds": 3600})) as (server, _):
        await ready(server)
        uid = server.uid(PODS, "digits-worker-1")
        server.fail("digits-worker-1")
        # By the time its back-off is over its node is gone too, so that no kubelet has to confirm the deletion.
        server.objects[PODS, "digits-worker-1"]["spec"]["terminationGracePeriodSeconds"] = 0
        await eventually(
            lambda: "digits-worker-1" in server.names() and server.uid(PODS, "digits-worker-1") != uid, seconds=10
        )
        (deleted,) = server.asked("delete", PODS, "digits-worker-1")
        assert server.asked("create", PODS, "digits-worker-1")[-1] - deleted < 0.1


@hand_turned
async def test_pod_that_an_upgraded_operator_replaces_has_the_trainer_image_of_its_attempt() -> None:
    """Trainers of two releases do not train together: the image changes with the next attempt."""

    def image(pod: str) -> str:
        return str(server.objects[PODS, pod]["spec"]["containers"][0]["image"])

    body = job()
    del body["spec"]["image"]
    async with operated(body) as (server, _):
        await ready(server)
    upgraded = Operator(server, trainer_image="example.org/trainer:1")
    async with upgraded.running():
        for (resource, _), body in list(server.objects.items()):
            server.tell(resource, {"type": "ADDED", "object": body})  # type: ignore[arg-type]
        uid = server.uid(PODS, "digits-worker-1")
        server.objects[PODS, "digits-worker-1"]["spec"]["terminationGracePeriodSeconds"] = 0
        server.fail("digits-worker-1")
        await eventually(
            lambda: "digits-worker-1" in server.names() and server.uid(PODS, "digits-worker-1") != uid, seconds=50
        )
        assert image("digits-worker-1") == "example.org/trainer:0"


@hand_turned
async def test_pending_job_that_is_suspended_is_so_at_once() -> None:
    async with operated() as (server, _):
        server.change(JOBS, JOB.name, lambda body: body["spec"].update(suspend=True))
        assert await eventually(lambda: server.condition("Suspended")[0] == "True", seconds=59) < 3
        assert server.names() == []


SUSPENDS = {"name": "diverged", "metric": "Loss", "above": 20, "forSeconds": 0, "action": "Suspend"}


async def breach(operator: Operator, *, good: int = 1) -> None:
    """The master reports steps with a good loss, and then one in breach of the rule."""
    record = operator.records.find(JOB)
    assert record is not None
    for step, loss in (*((1 + more, 1.0) for more in range(good)), (good + 1, 30.0)):
        record.report(Progress(attempt=1, step=step, loss=loss, last_update_time=clock()), clock())
        operator.queue.add(JOB)
        await asyncio.sleep(5)


@hand_turned
async def test_job_whose_rule_suspends_it_has_spec_suspend_and_then_no_pods() -> None:
    async with operated(job(health={"rules": [SUSPENDS]})) as (server, operator):
        await ready(server)
        await breach(operator)
        await eventually(lambda: server.objects[JOBS, JOB.name]["spec"].get("suspend") is True, seconds=30)
        await eventually(lambda: server.condition("Suspended")[1] == "Suspending", seconds=10)
        await operator.events.drain()
        said = [body["message"] for (kind, _), body in server.objects.items() if kind is EVENTS]
        assert "Rule diverged of spec.health: Loss is 30, above 20 for 0 s; the job is suspended" in said


@hand_turned
async def test_job_is_rolled_back_to_its_last_good_report_though_its_status_is_written_seldom() -> None:
    rule, volume = SUSPENDS | {"action": "RollBack"}, {"persistentVolumeClaim": "c"}
    body = job(health={"rules": [rule]}, checkpoint={"volume": volume}, observability={"statusIntervalSeconds": 3600})
    async with operated(body) as (server, operator):
        await ready(server)
        await breach(operator, good=5)
        await eventually(lambda: "rollBack" in server.objects[JOBS, JOB.name]["status"], seconds=30)
        assert server.objects[JOBS, JOB.name]["status"]["rollBack"] == {"attempt": 2, "step": 5}


@hand_turned
async def test_pods_of_a_job_that_the_operator_may_not_suspend_are_replaced() -> None:
    async with operated(job(health={"rules": [SUSPENDS]})) as (server, operator):
        await ready(server)
        server.fault = lambda verb, *_: Refused(403, "Forbidden", "it may not") if verb == "patch spec" else None
        await breach(operator)
        await eventually(lambda: server.asked("patch spec", JOBS, JOB.name) != [], seconds=30)
        uid = server.uid(PODS, "digits-worker-1")
        server.fail("digits-worker-1")
        server.objects[PODS, "digits-worker-1"]["spec"]["terminationGracePeriodSeconds"] = 0
        await eventually(
            lambda: "digits-worker-1" in server.names() and server.uid(PODS, "digits-worker-1") != uid, seconds=50
        )
        assert len(server.asked("patch spec", JOBS, JOB.name)) == 1
        server.fault = lambda *_: None
        await eventually(lambda: server.objects[JOBS, JOB.name]["spec"].get("suspend") is True, seconds=61)


@hand_turned
async def test_status_that_has_to_wait_delays_no_replacement() -> None:
    async with operated(status_interval=20.0) as (server, _):
        await ready(server)
        uid = server.uid(PODS, "digits-worker-1")
        server.objects[PODS, "digits-worker-1"]["spec"]["terminationGracePeriodSeconds"] = 0
        server.fail("digits-worker-1", code=75)  # counted, and so written at once; its place is free after a second
        failed = now()
        await asyncio.sleep(0.1)
        server.change(PODS, "digits-worker-0", lambda body: body["status"].update(conditions=[]))
        await eventually(
            lambda: "digits-worker-1" in server.names() and server.uid(PODS, "digits-worker-1") != uid, seconds=50
        )
        assert now() - failed < 5


def slow_writes(server: ApiServer, seconds: float) -> None:
    patch_status = server.patch_status

    async def slow(*args: Any) -> Any:
        await asyncio.sleep(seconds)
        return await patch_status(*args)

    server.patch_status = slow  # type: ignore[method-assign]


def named(name: str) -> Body:
    body = job()
    body["metadata"]["name"] = name
    return body


@hand_turned
async def test_of_many_jobs_all_get_their_pods_before_their_statuses_and_each_gets_its_first_event() -> None:
    names = [f"job-{number}" for number in range(40)]
    async with operated(started=False) as (server, operator):
        slow_writes(server, 0.1)
        for name in names:
            server.put(JOBS, named(name))
        await eventually(lambda: all("startTime" in server.objects[JOBS, name].get("status", {}) for name in names))
        last_pod = server.asked("create", PODS)[-1]
        assert sum(write < last_pod for write in server.asked("patch", JOBS)) < 4
        assert len(server.asked("patch", JOBS)) == len(names)
        await operator.events.drain()
        posted = [body for (resource, _), body in server.objects.items() if resource is EVENTS]
        assert sorted((event["involvedObject"]["name"], event["reason"]) for event in posted) == [
            (name, "Created") for name in sorted(names)
        ]


@hand_turned
async def test_job_that_begins_in_trouble_is_written_to_have_begun_before_it_is_left_alone() -> None:
    async with operated() as (server, _):
        slow_writes(server, 1.0)
        server.change(JOBS, JOB.name, lambda body: body["spec"].update(suspend=True))
        await eventually(lambda: server.condition("Suspended")[0] == "True", seconds=59)
        # By now a write has taken a second, of which a tenth counts: a status that can wait does so for 3 s.
        server.fault = lambda verb, resource, name: (
            Unavailable(429, "TooManyRequests", "later", retry_after=60.0)
            if (verb, resource, name) == ("create", PODS, "second-worker-1")
            else None
        )
        server.put(JOBS, named("second"))
        began = now()
        await eventually(lambda: "startTime" in server.objects[JOBS, "second"].get("status", {}))
        assert now() - began < 1.5


@pytest.mark.parametrize("other_is_seen", [False, True], ids=["neither is seen", "the other is seen"])
@hand_turned
async def test_child_in_whose_place_another_came_is_asked_for_once_and_not_for_ever(*, other_is_seen: bool) -> None:
    async with operated(started=False) as (server, operator):
        server.tell = lambda resource, event: operator.intake.take(resource, event) if resource is JOBS else None
        server.put(JOBS, job())
        await eventually(lambda: server.names() == PODS_OF_JOB)
        body = server.objects[PODS, "digits-worker-0"]
        server.remove(PODS, "digits-worker-0")
        await asyncio.sleep(0.1)
        if other_is_seen:
            server.tell = operator.intake.take  # type: ignore[assignment]
        server.put(PODS, body)
        await asyncio.sleep(10 * LATE)
        assert len(server.asked("get", PODS, "digits-worker-0")) == 1
        assert operator.expectations.next_deadline(JOB) is None


@pytest.mark.parametrize("there", [True, False], ids=["another is there", "nothing is there"])
@hand_turned
async def test_deleted_pod_whose_end_was_missed_is_asked_for_until_it_is_gone(*, there: bool) -> None:
    async with operated() as (server, operator):
        await ready(server)
        server.change(JOBS, JOB.name, lambda body: body["spec"].update(suspend=True))
        await eventually(lambda: all("deletionTimestamp" in str(server.objects[PODS, name]) for name in PODS_OF_JOB))
        server.tell = lambda *_: None
        for name in PODS_OF_JOB:
            server.remove(PODS, name)
        if there:
            server.put(PODS, {"metadata": {"name": "digits-worker-0"}, "spec": {}})
        await eventually(lambda: server.condition("Suspended")[0] == "True", seconds=30 + LATE + 5)
        await asyncio.sleep(LATE)
        assert operator.expectations.next_deadline(JOB) is None


@hand_turned
async def test_creation_that_the_watch_tells_of_before_its_answer_is_not_awaited() -> None:
    async with operated(started=False) as (server, operator):
        create = server.create

        async def slow(resource: Resource, *args: object) -> object:
            answer = await create(resource, *args)  # type: ignore[arg-type]
            await asyncio.sleep(1)
            return answer

        server.create = slow  # type: ignore[method-assign, assignment]
        server.put(JOBS, job())
        await eventually(lambda: server.names() == PODS_OF_JOB)
        await asyncio.sleep(3)
        assert operator.expectations.next_deadline(JOB) is None


@pytest.mark.parametrize(("interval", "reads"), [(3600, 10), (10, 10), (2, 2)])
@hand_turned
async def test_master_is_read_often_however_seldom_the_status_is_written(interval: int, reads: int) -> None:
    times: list[float] = []

    async def refused(_: object) -> bytes:
        times.append(now())
        raise Unreadable

    async with operated(job(observability={"statusIntervalSeconds": interval}), fetch=refused) as (server, _):
        await ready(server)
        await eventually(lambda: len(times) == 2)
        assert times[1] - times[0] == pytest.approx(reads, abs=0.1)


@hand_turned
async def test_snapshot_tells_since_when_this_process_has_known_of_the_job() -> None:
    server = ApiServer()
    for number in (1, 2):
        operator = Operator(server)
        async with operator.running():
            began = now()
            if number == 1:
                server.put(JOBS, job())
            else:
                operator.cache.jobs.put(server.objects[JOBS, JOB.name])
                operator.queue.add(JOB)
            await asyncio.sleep(30)
            record = operator.records.find(JOB)
            assert record
            assert record.known_since
            assert (record.known_since.timestamp() % 3600) == pytest.approx(began - 1000, abs=1)


@hand_turned
async def test_pass_sends_no_request_before_it_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[Snapshot] = []

    def decide(snapshot: Snapshot) -> Plan:
        decided.append(snapshot)
        return plan.decide(snapshot)

    async with operated() as (server, operator):
        for name in PODS_OF_JOB:
            server.wait(name)
        await asyncio.sleep(MOUNT_SECONDS)
        monkeypatch.setattr(reconcile, "decide", decide)
        one_pass = operator.reconciler.reconcile(JOB)
        with contextlib.suppress(StopIteration):
            one_pass.send(None)  # until it has to wait for an answer
        one_pass.close()
        assert decided
