"""What one namespace can have very much of, or change very often, costs the others little."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disttrain.api import DistTrainJob
from disttrain.api.names import Role
from disttrain.controller import events
from disttrain.controller.apply import Executor
from disttrain.controller.cache import Cache, Key
from disttrain.controller.events import EventPoster
from disttrain.controller.expectations import Expectations
from disttrain.controller.projection import LONGEST as LONGEST_MESSAGE
from disttrain.controller.projection import project_pod
from disttrain.controller.queue import WorkQueue
from disttrain.controller.record import JobRecord
from disttrain.controller.volume_failures import LONGEST, MOST_EVENTS, MOUNT_SECONDS, QUESTION_SECONDS, VolumeFailures
from disttrain.kube.api import EVENTS, JOBS, PODS, Page, Resource
from disttrain.plan.model import CreatePod, Event, Phase, PodView
from unit.controller.bodies import pod
from unit.controller.fake_api import NOON, ApiServer, clock, job
from unit.controller.hand_turned import hand_turned, now


def named(namespace: str, name: str = "digits", **spec: Any) -> dict[str, Any]:
    body = job(**spec)
    body["metadata"] |= {"namespace": namespace, "name": name, "uid": f"{namespace}-{name}", "resourceVersion": "5"}
    return body


@hand_turned
async def test_thousands_of_jobs_of_one_namespace_delay_another_namespaces_job_by_one_turn() -> None:
    queue: WorkQueue[Key] = WorkQueue(namespace=lambda key: key.namespace)
    for number in range(5000):
        queue.add(Key("flood", str(number)))
    queue.add(Key("team", "digits"))
    assert [await queue.get() for _ in range(2)] == [Key("flood", "0"), Key("team", "digits")]


@hand_turned
async def test_slow_passes_of_one_namespace_leave_workers_to_the_others() -> None:
    queue: WorkQueue[Key] = WorkQueue(namespace=lambda key: key.namespace, most_each=3)
    for number in range(10):
        queue.add(Key("flood", str(number)))
    in_work = [await queue.get() for _ in range(3)]
    worker = asyncio.ensure_future(queue.get())
    await asyncio.sleep(0)
    assert not worker.done()
    queue.add(Key("team", "digits"))
    assert await worker == Key("team", "digits")
    worker = asyncio.ensure_future(queue.get())
    await asyncio.sleep(0)
    assert not worker.done()
    queue.done(in_work[0])
    assert await worker == Key("flood", "3")


@hand_turned
async def test_job_of_a_thousand_pods_delays_the_pods_of_another_namespaces_job_by_a_moment() -> None:
    class Slow(ApiServer):
        async def create(self, resource: Resource, namespace: str, body: dict[str, Any]) -> dict[str, Any]:
            await asyncio.sleep(1.0)
            return {"metadata": {**body["metadata"], "namespace": namespace, "uid": body["metadata"]["name"], **NEW}}

    cache = Cache()
    executor = Executor(Slow(), cache, Expectations(cache), trainer_image="x", concurrency=8, clock=clock)
    large = DistTrainJob.parse(named("flood", worker={"replicas": 1000}, trainer=COMMAND))
    small = DistTrainJob.parse(named("team"))
    began = now()
    flood = asyncio.create_task(
        executor.carry_out(large, JobRecord("flood-digits"), [worker(index) for index in range(1000)])
    )
    await asyncio.sleep(10)
    began = now()
    await executor.carry_out(small, JobRecord("team-digits"), [worker(index) for index in range(2)])
    assert now() - began <= 2.0
    flood.cancel()


NEW = {"resourceVersion": "7", "creationTimestamp": "2026-01-01T12:00:00Z"}
COMMAND = {"command": ["python"]}


def worker(index: int) -> CreatePod:
    return CreatePod(role=Role.WORKER, index=index, attempt=1)


@hand_turned
async def test_namespace_that_floods_with_events_loses_its_own_and_not_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = ApiServer()
    poster = EventPoster(server)
    for number in range(3 * events.WAITING):
        poster.post(Key("flood", "digits"), "uid", Event(reason="Restarted", message=str(number)))
    poster.post(Key("team", "letters"), "uid", Event(reason="Created", message="it begins"))
    await poster.post_next()
    await poster.post_next()
    assert sorted(body["involvedObject"]["name"] for body in server.objects.values()) == ["digits", "letters"]


def waits(uid: str) -> PodView:
    return PodView(
        name="p",
        uid=uid,
        role=Role.WORKER,
        index=0,
        attempt=1,
        phase=Phase.PENDING,
        created=NOON,
        node="node",
        reason="ContainerCreating",
    )


class Flooded(ApiServer):
    """A namespace has Events without an end."""

    pages = 0

    async def list(self, resource: Resource, namespace: str | None, *, selector: str = "", fields: str = "") -> Any:
        assert resource is EVENTS
        for number in range(10_000):
            self.pages += 1
            about = {"uid": f"{number}"}
            yield Page([{"involvedObject": about, "message": "x" * 100_000} for _ in range(500)], 5)


@hand_turned
async def test_events_of_a_namespace_are_read_and_kept_up_to_a_bound() -> None:
    server, record = Flooded(), JobRecord("u")
    record.wait_for_volumes(["0"], now())
    reader = VolumeFailures(server, lambda _, messages: record.found_volume_failures(messages))
    reader.follow(Key("flood", "digits"), now())
    await asyncio.sleep(MOUNT_SECONDS + 1)
    await reader.close()
    assert server.pages == 2 * MOST_EVENTS / 500
    assert record.volume_failures == {"0": "x" * LONGEST}


@hand_turned
async def test_what_is_known_of_a_namespace_is_forgotten_when_no_pod_waits_there() -> None:
    reader, before = VolumeFailures(ApiServer(), lambda *_: None), len(asyncio.all_tasks())
    for number in range(50):
        reader.follow(Key(f"team-{number}", "digits"), now())
    assert len(asyncio.all_tasks()) == before + 50
    await asyncio.sleep(MOUNT_SECONDS + 1)
    for number in range(50):
        reader.follow(Key(f"team-{number}", "digits"), None)
    await asyncio.sleep(QUESTION_SECONDS + 1)
    assert len(asyncio.all_tasks()) == before


def test_job_whose_labels_and_annotations_change_all_the_time_is_unchanged() -> None:
    cache = Cache()
    first, again, suspended = named("team"), named("team"), named("team", suspend=True)
    again["metadata"] |= {"resourceVersion": "6", "labels": {"a": "b"}, "annotations": {"a": "b"}}
    suspended["metadata"] |= {"resourceVersion": "7"}
    assert cache.stores[JOBS].put(first)
    assert cache.stores[JOBS].put(again) is None
    entry = cache.jobs.get(Key("team", "digits"))
    assert entry
    assert entry.value.version == "6", "the next write names the newest version"
    assert cache.stores[JOBS].put(suspended)


def test_job_whose_label_of_a_queue_of_kueue_changes_is_changed() -> None:
    cache = Cache()
    queued, free = named("team"), named("team")
    queued["metadata"] |= {"labels": {"kueue.x-k8s.io/queue-name": "team"}}
    free["metadata"] |= {"resourceVersion": "6"}
    cache.stores[JOBS].put(queued)
    assert cache.stores[JOBS].put(free)


@pytest.mark.parametrize(
    "status",
    [
        pytest.param({"phase": "Hibernating"}, id="phase of a later Kubernetes"),
        pytest.param({"conditions": [{"type": "Ready"}]}, id="condition without a status"),
        pytest.param({"conditions": "none"}, id="no list"),
        pytest.param({"containerStatuses": [{"name": "trainer", "state": {"terminated": {"finishedAt": "now"}}}]}, id="no time"),
        pytest.param({"containerStatuses": [{"name": "trainer", "state": {"terminated": {"message": 5}}}]}, id="no text"),
    ],
)  # fmt: skip
def test_pod_whose_status_cannot_be_read_counts_as_one_without_a_status(status: dict[str, Any]) -> None:
    view = project_pod(pod(5, **status))
    assert view
    assert view.phase is Phase.PENDING
    assert Cache().stores[PODS].put(pod(5, **status))


def test_long_messages_of_a_pod_are_kept_up_to_a_bound() -> None:
    ended = {"exitCode": 1, "message": "x" * 1_000_000, "finishedAt": "2026-01-01T12:00:00Z"}
    states = [{"name": "trainer", "state": {"terminated": ended}}]
    view = project_pod(pod(5, phase="Failed", reason="Evicted", message="y" * 1_000_000, containerStatuses=states))
    assert view
    assert len(view.message) <= LONGEST_MESSAGE
    assert len(view.termination.message) <= LONGEST_MESSAGE
