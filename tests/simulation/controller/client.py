"""`KubeApi` of one simulated process: requests take time, and fail as they are planned to."""

import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from disttrain.controller.resync import SELECTORS
from disttrain.kube.api import EVENTS, JOBS, ApiError, Body, Page, Refused, Resource, Unavailable
from simulation.controller.api_server import ApiServer
from simulation.controller.faults import AT_A_PROCESS, ERRORS, Fault, Kind
from simulation.controller.world import Process

TIMEOUT_SECONDS = 15.0
"""Of a request, as the operator's settings have it."""


@dataclass
class Requests:
    """The requests of all processes of one operator, and the faults that wait among them."""

    faults: list[Fault]
    count: int = 0
    lists: int = 0
    gets: int = 0
    conflicts: int = 0
    """Requests that were answered with 409 though no fault says so."""
    refused: int = 0
    """Creations that were refused though no fault says so."""
    happened: list[Fault] = field(default_factory=list)

    def next(self, verb: str) -> Fault | None:
        """The fault of the next request."""
        self.count += 1
        self.lists += verb == "list"
        self.gets += verb == "get"
        for fault in self.faults:
            number = self.lists if fault.kind is Kind.OLDER_LIST else self.count
            if number < fault.at or (fault.kind is Kind.OLDER_LIST and verb != "list"):
                continue
            self.faults.remove(fault)
            self.happened.append(fault)
            return fault
        return None


Wrote = Callable[[str, Resource, str, str, Body | None, Body | None, bool], None]
"""Called after a write with verb, resource, namespace, name, the object before it and after it, and whether the operator knew of the end of
the job when it sent a creation."""


class DirectApi:
    """`KubeApi` of an API server in memory, without delays and faults."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server

    async def get(self, resource: Resource, namespace: str, name: str) -> Body:
        return self._server.get(resource, namespace, name)

    async def list(
        self, resource: Resource, namespace: str | None, *, selector: str = "", fields: str = ""
    ) -> AsyncIterator[Page]:
        self._server.check(resource)
        yield Page(*self._server.list(resource, namespace, selector=selector, fields=fields))

    async def create(self, resource: Resource, namespace: str, body: Body) -> Body:
        self._server.check(resource)
        return metadata_alone(self._server.create(resource, namespace, body))

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        return self._server.patch(resource, namespace, name, patch)

    async def patch_status(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        return self._server.patch_status(resource, namespace, name, patch)

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> Body:
        return self._server.delete(resource, namespace, name, uid=uid, grace_seconds=grace_seconds)

    async def proxy(self, namespace: str, pod: str, port: int, path: str, *, most: int) -> bytes:
        raise Unavailable(503, "ServiceUnavailable", "no proxy here")


def metadata_alone(body: Body) -> Body:
    """What is answered to a creation."""
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": body["metadata"]}


class Client:
    """The requests of one process. `crash` kills it; `befall` lets a fault of the process happen."""

    def __init__(
        self,
        server: ApiServer,
        process: Process,
        requests: Requests,
        choices: random.Random,
        *,
        crash: Callable[[], None],
        befall: Callable[[Fault], None],
        knows_end: Callable[[str, Body], bool],
        wrote: Wrote,
        refuse: Callable[[str, Resource, str, Body], ApiError | None],
        trace: Callable[[str], None],
    ) -> None:
        self._server = server
        self._process = process
        self._requests = requests
        self._choices = choices
        self._crash = crash
        self._befall = befall
        self._knows_end = knows_end
        self._lists = 0
        self._decided: tuple[Body, str] = ({}, "")
        """The last status that was sent, and the version that it was decided on."""
        self._wrote = wrote
        self._refuse = refuse
        self._trace = trace

    async def get(self, resource: Resource, namespace: str, name: str) -> Body:
        body: Body = await self._ask(
            "get", resource, namespace, name, lambda: self._server.get(resource, namespace, name)
        )
        return body

    async def list(
        self, resource: Resource, namespace: str | None, *, selector: str = "", fields: str = ""
    ) -> AsyncIterator[Page]:
        def act(at: int | None = None) -> Page:
            return Page(*self._server.list(resource, namespace, selector=selector, fields=fields, at=at))

        self._server.check(
            resource
        )  # at once: so a life without such a kind is the same as before the operator asked for it
        yield await self._ask("list", resource, namespace or "", selector or fields, act)

    async def create(self, resource: Resource, namespace: str, body: Body) -> Body:
        name, knew = body["metadata"].get("name", ""), self._knows_end(namespace, body)
        made: Body = await self._write(
            "create", resource, namespace, name, lambda: self._server.create(resource, namespace, body), body, knew
        )
        return metadata_alone(made)

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        return await self._write(
            "patch", resource, namespace, name, lambda: self._server.patch(resource, namespace, name, patch), patch
        )

    async def patch_status(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        status, version = patch["status"], patch["metadata"].get("resourceVersion", "")
        if status is self._decided[0] and version != self._decided[1]:
            raise AssertionError(f"what was decided on version {self._decided[1]} is written over version {version}")
        self._decided = status, version
        return await self._write(
            "patch",
            resource,
            namespace,
            name,
            lambda: self._server.patch_status(resource, namespace, name, patch),
            patch,
        )

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> Body:
        return await self._write(
            "delete",
            resource,
            namespace,
            name,
            lambda: self._server.delete(resource, namespace, name, uid=uid, grace_seconds=grace_seconds),
            {"uid": uid, "grace": grace_seconds},
        )

    async def proxy(self, namespace: str, pod: str, port: int, path: str, *, most: int) -> bytes:
        raise Unavailable(503, "ServiceUnavailable", "no proxy here")

    # Parts

    async def _write(
        self,
        verb: str,
        resource: Resource,
        namespace: str,
        name: str,
        act: Callable[[], Body],
        sent: Body,
        knew: bool = False,
    ) -> Body:
        def write() -> Body:
            if refusal := self._refuse(verb, resource, namespace, sent):
                raise refusal
            before = self._find(resource, namespace, name)
            answer = act()
            after = self._find(resource, namespace, name)
            if after is not before:
                self._wrote(verb, resource, namespace, name, before, after, knew)
            return answer

        answer: Body = await self._ask(verb, resource, namespace, name, write)
        return answer

    def _find(self, resource: Resource, namespace: str, name: str) -> Body | None:
        try:
            return self._server.get(resource, namespace, name)
        except ApiError:
            return None

    async def _ask(self, verb: str, resource: Resource, namespace: str, name: str, act: Callable[..., Any]) -> Any:
        process, world = self._process, self._process.world
        fault = self._requests.next(verb) if resource is not EVENTS else None
        answered = process.create_future()
        there, back = 0.001 + 0.004 * self._choices.random(), 0.001 + 0.004 * self._choices.random()
        kind = fault.kind if fault is not None else None
        self._lists += verb == "list"
        if kind is Kind.OLDER_LIST and self._lists <= len(SELECTORS.keys() - self._server.absent):
            kind = None  # the first lists of a process are of the newest state, as it asks for no version
        self._trace(f"{process.name} {verb} {resource.plural} {namespace}/{name}{f'  ! {kind}' if kind else ''}")
        if kind is Kind.CRASH_BEFORE:
            self._crash()
        elif kind in ERRORS:
            world.after(there + back, _fail, answered, _sensible(ERRORS[kind](), verb, resource))
        else:
            if kind is Kind.LATE:
                there = TIMEOUT_SECONDS + fault.seconds if fault is not None else there
            if kind is Kind.SLOW and fault is not None:
                back = min(fault.seconds, TIMEOUT_SECONDS - 1)
            if kind in AT_A_PROCESS and fault is not None:
                self._befall(fault)
                process.call_soon(world.after, there, self._perform, answered, act, back, kind)
            elif kind is Kind.OLDER_LIST and fault is not None:
                older = max(100, self._server.version - int(fault.seconds))
                world.after(there, self._perform, answered, lambda: act(older), back, kind)
            else:
                world.after(there, self._perform, answered, act, back, kind)
            if kind in (Kind.LATE, Kind.REPLY_LOST):
                lost = Unavailable(0, "ServerTimeoutError", "no answer in time")
                world.after(TIMEOUT_SECONDS if kind is Kind.LATE else there + back, _fail, answered, lost)
        return await answered

    def _perform(self, answered: Any, act: Callable[[], Any], back: float, kind: Kind | None) -> None:
        """The API server's part, whatever became of the process that asked."""
        world = self._process.world
        try:
            result = act()
        except ApiError as error:
            self._trace(f"{self._process.name}   -> {error}")
            self._requests.conflicts += error.status == 409
            self._requests.refused += isinstance(error, Refused)
            world.after(back, _fail, answered, error)
            return
        if kind is Kind.CRASH_AFTER:
            self._crash()
        elif kind not in (Kind.REPLY_LOST, Kind.LATE):
            world.after(back, _answer, answered, result)


def _answer(answered: Any, result: Any) -> None:
    if not answered.done():
        answered.set_result(result)


def _fail(answered: Any, error: ApiError) -> None:
    if not answered.done():
        answered.set_exception(error)


def _sensible(error: ApiError, verb: str, resource: Resource) -> ApiError:
    """A status is refused with the field that is wrong."""
    if error.status == 422 and verb == "patch" and resource is JOBS:
        return Refused(422, "Invalid", error.message, fields=("status.training.loss",))
    return error
