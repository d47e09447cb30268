"""An API server in memory with faults to order.

What is like the real one: names, uids, resource versions, 409, preconditions, grace periods, a watch with a label selector, a list with
a field selector.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from disttrain.api.names import API_VERSION, KIND, LABEL_JOB_NAME
from disttrain.controller.cache import Key
from disttrain.kube.api import EVENTS, JOBS, PODS, ApiError, Body, Conflict, NotFound, Page, Resource
from unit.controller.hand_turned import now

NAMESPACE = "team"
JOB = Key(NAMESPACE, "digits")
PODS_OF_JOB = ["digits-master-0", "digits-worker-0", "digits-worker-1"]
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)

Fault = Callable[[str, Resource, str], ApiError | None]
"""What is answered to a verb about an object in the place of the truth; None: the truth."""


def clock() -> datetime:
    """The time of day that goes with the loop's own."""
    return NOON + timedelta(seconds=now() - 1000)


def stamp() -> str:
    return clock().strftime("%Y-%m-%dT%H:%M:%SZ")


def selected(body: Body, fields: str) -> bool:
    """Whether it meets a field selector such as involvedObject.kind=Pod,reason=FailedMount."""
    for path, _, value in (each.partition("=") for each in fields.split(",") if each):
        found: Any = body
        for part in path.split("."):
            found = found[part]
        if found != value:
            return False
    return True


def job(**spec: Any) -> Body:
    """A data parallel job of two workers."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": JOB.name, "namespace": NAMESPACE},
        "spec": {
            "image": "example.org/trainer:1",
            "strategy": {"type": "DataParallel"},
            "trainer": {
                "model": "mine.net:model",
                "dataset": "mine.net:dataset",
                "optimizer": {"name": "SGD", "learningRate": 0.1},
                "epochs": 1,
            },
            "worker": {"replicas": 2},
            **spec,
        },
    }


class ApiServer:
    """The API server, and the watch that tells of it."""

    def __init__(self) -> None:
        self.objects: dict[tuple[Resource, str], Body] = {}
        self.requests: list[tuple[float, str, str, str]] = []
        """(loop's time, verb, plural, name) of each request of the operator."""
        self.fault: Fault = lambda *_: None
        self.tell: Callable[[Resource, Body], None] = lambda *_: None
        """The watch; does nothing while it is cut."""
        self.pruned: tuple[str, ...] = ()
        """Fields of the status that the schema does not have."""
        self._uids = (f"uid-{number}" for number in itertools.count(1))
        self.versions = itertools.count(100)

    # -- what the operator asks for

    async def get(self, resource: Resource, namespace: str, name: str) -> Body:
        await self._asked("get", resource, name)
        return copy.deepcopy(self._find(resource, name))

    async def list(
        self, resource: Resource, namespace: str | None, *, selector: str = "", fields: str = ""
    ) -> AsyncIterator[Page]:
        await self._asked("list", resource, fields)
        found = [body for (kind, _), body in self.objects.items() if kind is resource and selected(body, fields)]
        yield Page(copy.deepcopy(found), next(self.versions))

    async def create(self, resource: Resource, namespace: str, body: Body) -> Body:
        name = body["metadata"]["name"]
        await self._asked("create", resource, name)
        if (resource, name) in self.objects:
            raise Conflict(409, "AlreadyExists", f"{name} exists")
        made = self.put(resource, body)
        return {"metadata": copy.deepcopy(made["metadata"])}

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        await self._asked("patch spec", resource, name)
        body = self._find(resource, name)
        if patch["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            raise Conflict(409, "Conflict", "it moved on")
        body["spec"] = merged(body["spec"], patch["spec"])
        return copy.deepcopy(self._changed(resource, body))

    async def patch_status(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        await self._asked("patch", resource, name)
        body = self._find(resource, name)
        if patch["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            raise Conflict(409, "Conflict", "it moved on")
        known = {field: value for field, value in patch["status"].items() if field not in self.pruned}
        body["status"] = merged(body.get("status", {}), known)
        return copy.deepcopy(self._changed(resource, body))

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> Body:
        await self._asked("delete", resource, name)
        body = self._find(resource, name)
        if uid and body["metadata"]["uid"] != uid:
            raise Conflict(409, "Conflict", "the UID in the precondition is another's")
        spec = body.get("spec", {})  # a Secret has none
        grace = spec.get("terminationGracePeriodSeconds", 30) if grace_seconds is None else grace_seconds
        if resource is PODS and spec.get("nodeName") and grace:
            body["metadata"] |= {"deletionTimestamp": stamp(), "deletionGracePeriodSeconds": grace}
            return copy.deepcopy(self._changed(resource, body))
        self.remove(resource, name)
        return {"kind": "Status", "status": "Success"}

    async def proxy(self, namespace: str, pod: str, port: int, path: str, *, most: int) -> bytes:
        raise NotImplementedError

    # -- what others do

    def put(self, resource: Resource, body: Body) -> Body:
        """Another client creates an object."""
        made = copy.deepcopy(body)
        made["metadata"] = {
            "namespace": NAMESPACE,
            **made["metadata"],
            "uid": next(self._uids),
            "creationTimestamp": stamp(),
            "generation": 1,
        }
        self.objects[resource, made["metadata"]["name"]] = made
        return self._changed(resource, made)

    def change(self, resource: Resource, name: str, change: Callable[[Body], None]) -> None:
        """Another client changes an object."""
        body = self._find(resource, name)
        before = LABEL_JOB_NAME in body["metadata"].get("labels", {})
        change(body)
        self._changed(resource, body, listed=before)

    def remove(self, resource: Resource, name: str) -> None:
        """It is gone."""
        body = self.objects.pop((resource, name))
        self._tell("DELETED", resource, body)

    def run(self, *names: str) -> None:
        """The kubelet's part: pods that run and are ready."""
        for name in names:
            self.say(
                name,
                phase="Running",
                podIP="10.0.0.1",
                conditions=[
                    {"type": type_, "status": "True", "lastTransitionTime": stamp()}
                    for type_ in ("PodScheduled", "Ready")
                ],
                containerStatuses=[{"name": "trainer", "state": {"running": {"startedAt": stamp()}}}],
            )

    def wait(self, name: str, reason: str = "ContainerCreating") -> None:
        """A pod that has a node and no container yet."""
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": stamp()}
        container = {"name": "trainer", "state": {"waiting": {"reason": reason}}}
        self.say(name, phase="Pending", conditions=[scheduled], containerStatuses=[container])

    def fail(self, name: str, code: int = 137) -> None:
        ended = {"exitCode": code, "reason": "Error", "finishedAt": stamp()}
        self.say(name, phase="Failed", containerStatuses=[{"name": "trainer", "state": {"terminated": ended}}])

    def say(self, name: str, **status: Any) -> None:
        def change(body: Body) -> None:
            body["spec"]["nodeName"] = "node-1"
            body["status"] = {**body.get("status", {}), **status}

        self.change(PODS, name, change)

    # -- what a test asks

    def names(self, resource: Resource = PODS) -> list[str]:
        return sorted(name for kind, name in self.objects if kind is resource)

    def uid(self, resource: Resource, name: str) -> str:
        return str(self._find(resource, name)["metadata"]["uid"])

    @property
    def status(self) -> Body:
        """The job's."""
        status: Body = self._find(JOBS, JOB.name).get("status", {})
        return status

    def condition(self, type_: str) -> tuple[str, str, str]:
        for condition in self.status.get("conditions", ()):
            if condition["type"] == type_:
                return condition["status"], condition["reason"], condition["message"]
        return "", "", ""

    def asked(self, verb: str, resource: Resource, name: str = "") -> list[float]:
        """When it was asked for."""
        wanted = (verb, resource.plural)
        return [time for time, *asked, about in self.requests if tuple(asked) == wanted and (not name or about == name)]

    # -- parts

    async def _asked(self, verb: str, resource: Resource, name: str) -> None:
        await asyncio.sleep(0.001)  # it takes a moment, in which others go on
        self.requests.append((now(), verb, resource.plural, name))
        if error := self.fault(verb, resource, name):
            raise error

    def _find(self, resource: Resource, name: str) -> Body:
        try:
            return self.objects[resource, name]
        except KeyError:
            raise NotFound(404, "NotFound", f"{name} not found") from None

    def _changed(self, resource: Resource, body: Body, *, listed: bool = False) -> Body:
        body["metadata"]["resourceVersion"] = str(next(self.versions))
        selected = resource is JOBS or LABEL_JOB_NAME in body["metadata"].get("labels", {})
        if selected or listed:
            self._tell("MODIFIED" if selected else "DELETED", resource, body)
        return body

    def _tell(self, type_: str, resource: Resource, body: Body) -> None:
        if resource is not EVENTS:
            event = {"type": type_, "object": copy.deepcopy(body)}
            asyncio.get_running_loop().call_later(0.002, lambda: self.tell(resource, event))


def merged(old: Body, patch: Body) -> Body:
    """RFC 7386 as far as statuses need it."""
    result = dict(old)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = merged(result.get(key) or {}, value)
        else:
            result[key] = value
    return result
