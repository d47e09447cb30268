"""A pod whose volumes cannot be mounted says so by Events alone: who asks for them, how often, and what is made of the answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disttrain.controller.volume_failures import MOUNT_SECONDS, QUESTION_SECONDS
from disttrain.kube.api import EVENTS, JOBS, PODS, Refused
from unit.controller.fake_api import NAMESPACE, PODS_OF_JOB, ApiServer, job, stamp
from unit.controller.fake_cluster import eventually, operated
from unit.controller.hand_turned import hand_turned

MISSING = 'MountVolume.SetUp failed for volume "data" : secret "nope" not found'
SUMMARY = "Unable to attach or mount volumes: unmounted volumes=[data]: timed out waiting for the condition"


ELSEWHERE = 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) digits-master-0'


def post_event(server: ApiServer, pod: str, message: str, *, reason: str = "FailedMount", time: str = "") -> None:
    about = {"kind": "Pod", "namespace": NAMESPACE, "name": pod, "uid": server.uid(PODS, pod)}
    body: dict[str, Any] = {"metadata": {"name": f"{pod}.{len(server.objects)}"}, "involvedObject": about}
    server.put(EVENTS, {**body, "reason": reason, "message": message, "lastTimestamp": time or stamp()})


@pytest.mark.parametrize(
    ("message", "reason", "words"),
    [
        pytest.param(MISSING, "SecretNotFound", "create it in the job's namespace", id="Secret"),
        pytest.param(MISSING.replace("secret", "configmap"), "ConfigMapNotFound", "create it in", id="ConfigMap"),
        pytest.param("mount failed: exit status 32", "ContainerConfig", "exit status 32", id="anything else"),
    ],
)
@hand_turned
async def test_volume_that_cannot_be_mounted_is_named_in_the_condition(message: str, reason: str, words: str) -> None:
    async with operated() as (server, _):
        for name in PODS_OF_JOB:
            server.wait(name)
        post_event(server, "digits-worker-0", message)
        assert await eventually(lambda: server.condition("Ready")[1] == reason, seconds=10) < MOUNT_SECONDS + 2
        assert message in server.condition("Ready")[2]
        assert words in server.condition("Ready")[2]
        server.run(*PODS_OF_JOB)
        await eventually(
            lambda: "nope" not in server.condition("Ready")[2] and "exit" not in server.condition("Ready")[2]
        )


@hand_turned
async def test_claim_of_one_node_whose_pods_have_two_is_named_in_the_condition_with_what_to_do() -> None:
    async with operated() as (server, _):
        for name in PODS_OF_JOB:
            server.wait(name)
        # The attach-detach controller says it once; the kubelet sums it up every two minutes, and does not know why.
        post_event(server, "digits-worker-1", ELSEWHERE, reason="FailedAttachVolume")
        post_event(server, "digits-worker-1", SUMMARY, time="2026-01-01T13:00:00Z")
        await eventually(lambda: server.condition("Ready")[1] == "VolumeInUse", seconds=10)
        message = server.condition("Ready")[2]
        assert message.startswith(f"digits-worker-1: {ELSEWHERE}; ")
        assert "ReadWriteMany" in message
        assert "on one node" in message
        server.run(*PODS_OF_JOB)
        await eventually(lambda: "Multi-Attach" not in server.condition("Ready")[2])


@hand_turned
async def test_failures_of_a_pod_are_those_of_its_volumes_alone() -> None:
    async with operated() as (server, _):
        server.wait("digits-worker-0")
        post_event(server, "digits-worker-0", "network is not ready", reason="NetworkNotReady")
        await asyncio.sleep(MOUNT_SECONDS + QUESTION_SECONDS)
        assert server.asked("list", EVENTS)
        assert server.condition("Ready")[:2] == ("False", "Starting")


@hand_turned
async def test_newest_event_that_says_why_counts() -> None:
    async with operated() as (server, _):
        server.wait("digits-worker-0")
        post_event(server, "digits-worker-0", "an old one", time="2026-01-01T11:00:00Z")
        post_event(server, "digits-worker-0", MISSING)
        post_event(server, "digits-worker-0", SUMMARY, time="2026-01-01T13:00:00Z")
        await eventually(lambda: MISSING in server.condition("Ready")[2])


@hand_turned
async def test_namespace_is_asked_once_for_all_its_pods_and_seldom() -> None:
    async with operated(workers=3) as (server, _):
        for name in ("letters", "numbers"):
            another = job()
            another["metadata"]["name"] = name
            server.put(JOBS, another)
        await eventually(lambda: len(server.names()) == 9)
        for name in server.names():
            server.wait(name, "PodInitializing")
        jobs = ("digits", "letters", "numbers")
        for name in jobs:
            post_event(server, f"{name}-worker-1", MISSING)
        await eventually(
            lambda: all(MISSING in str(server.objects[JOBS, name]["status"]) for name in jobs),
            seconds=MOUNT_SECONDS + 2,
        )
        await asyncio.sleep(4 * QUESTION_SECONDS)
        for reason in ("FailedMount", "FailedAttachVolume"):
            assert 4 <= len(server.asked("list", EVENTS, f"involvedObject.kind=Pod,reason={reason}")) <= 5


@hand_turned
async def test_pod_that_has_its_sandbox_needs_no_question() -> None:
    async with operated() as (server, _):
        for name in PODS_OF_JOB:
            server.wait(name)
            server.say(name, conditions=[{"type": "PodReadyToStartContainers", "status": "True"}])
        await asyncio.sleep(60)
        assert server.asked("list", EVENTS) == []


@hand_turned
async def test_job_goes_on_where_the_operator_may_not_read_events() -> None:
    async with operated() as (server, _):
        server.fault = lambda verb, *_: Refused(403, "Forbidden", "no right") if verb == "list" else None
        for name in PODS_OF_JOB:
            server.wait(name)
        await asyncio.sleep(MOUNT_SECONDS + QUESTION_SECONDS)
        assert server.condition("Ready")[:2] == ("False", "Starting")
        server.run(*PODS_OF_JOB)
        await eventually(lambda: server.condition("Ready")[1] != "Starting")
