"""PodGroups: each is there before the pods that name it, and none of another owner is taken for the job's."""

from __future__ import annotations

import asyncio

from disttrain.kube.api import COSCHEDULING_GROUPS, JOBS, PODS, VOLCANO_GROUPS, ApiError, Refused, Resource
from unit.controller.fake_api import JOB, PODS_OF_JOB, job
from unit.controller.fake_cluster import eventually, operated
from unit.controller.hand_turned import hand_turned

GANG = {"scheduling": {"gang": "Coscheduling"}}


@hand_turned
async def test_pods_are_created_when_the_api_server_has_answered_that_it_has_their_group() -> None:
    async with operated(started=False) as (server, _):
        server.put(JOBS, job(**GANG))
        await eventually(lambda: len(server.status.get("replicaStatuses", ())) == 2)
        creations = [name for _, verb, plural, name in server.requests if (verb, plural) == ("create", "podgroups")]
        order = [plural for _, verb, plural, _ in server.requests if verb == "create" and plural != "events"]
        assert (creations, order[0], sorted(order[1:])) == (
            [JOB.name],
            "podgroups",
            ["networkpolicies", "pods", "pods", "pods", "services"],
        )


@hand_turned
async def test_no_pod_is_created_while_the_group_is_refused() -> None:
    def refused(verb: str, resource: Resource, name: str) -> ApiError | None:
        wrong = (verb, resource) == ("create", COSCHEDULING_GROUPS)
        return Refused(403, "Forbidden", "exceeded quota: podgroups") if wrong else None

    async with operated(started=False) as (server, _):
        server.fault = refused
        server.put(JOBS, job(**GANG))
        await eventually(lambda: server.condition("Scheduled")[:2] == ("False", "PodRefused"))
        assert [resource for resource, _ in server.objects if resource is PODS] == []
        server.fault = lambda *_: None
        await eventually(lambda: {name for kind, name in server.objects if kind is PODS} == {*PODS_OF_JOB}, seconds=20)


@hand_turned
async def test_group_of_another_owner_is_left_alone_and_no_pod_is_created() -> None:
    async with operated(started=False) as (server, _):
        theirs = server.put(COSCHEDULING_GROUPS, {"metadata": {"name": JOB.name}, "spec": {"minMember": 1}})
        server.put(JOBS, job(**GANG))
        await eventually(lambda: server.condition("Valid")[:2] == ("False", "NameTaken"))
        await asyncio.sleep(30)
        assert [resource for resource, _ in server.objects if resource is PODS] == []
        assert server.objects[COSCHEDULING_GROUPS, JOB.name]["metadata"]["uid"] == theirs["metadata"]["uid"]


@hand_turned
async def test_phase_of_a_pod_group_of_volcano_lets_its_pods_be_created() -> None:
    async with operated(started=False) as (server, _):
        server.put(JOBS, job(scheduling={"gang": "Volcano"}))
        await eventually(lambda: (VOLCANO_GROUPS, JOB.name) in server.objects)
        await asyncio.sleep(30)
        assert [resource for resource, _ in server.objects if resource is PODS] == []
        server.change(VOLCANO_GROUPS, JOB.name, lambda body: body.update(status={"phase": "Inqueue"}))
        await eventually(lambda: {name for kind, name in server.objects if kind is PODS} == {*PODS_OF_JOB}, seconds=2)
