"""Jobs on a cluster: listed, read and changed, with the rights of the user who asks."""

import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from disttrain.api.names import KIND, LABEL_JOB_NAME
from disttrain.client.errors import Rejected, of_answer
from disttrain.kube.api import EVENTS, JOBS, PODS, ApiError, Body, KubeApi

_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
"""RFC 1123, as Kubernetes has it of every name. Anything else would change the path of the request: that of "" is the path of all jobs."""


class Jobs:
    """The jobs of one namespace, or of all where a method says so. Each method is one request, or a page a request; raises ClusterError.
    So does the constructor, of a text that is no name of a namespace."""

    def __init__(self, api: KubeApi, namespace: str) -> None:
        _check_name(namespace, of="a namespace")
        self._api = api
        self.namespace = namespace

    async def all(self, *, everywhere: bool = False) -> list[Body]:
        """The stored jobs, by namespace and name. everywhere: of all namespaces."""
        namespace = None if everywhere else self.namespace
        jobs: list[Body] = []
        try:
            async for page in self._api.list(JOBS, namespace):
                jobs += page.items
        except ApiError as error:
            raise of_answer(error, what="list the jobs", namespace=namespace) from error
        return sorted(jobs, key=lambda job: (job["metadata"]["namespace"], job["metadata"]["name"]))

    async def get(self, name: str) -> Body:
        """A job as it is stored."""
        async with self._doing("read the job", name):
            return await self._api.get(JOBS, self.namespace, name)

    async def pods(self, job: Body) -> list[Body]:
        """The pods of a job, by name."""
        name = job["metadata"]["name"]
        pods: list[Body] = []
        async with self._doing("list the pods"):
            async for page in self._api.list(PODS, self.namespace, selector=f"{LABEL_JOB_NAME}={name}"):
                pods += page.items
        return sorted((pod for pod in pods if owns(job, pod)), key=lambda pod: str(pod["metadata"]["name"]))

    async def events(self, job: Body) -> list[Body]:
        """The Events about a job and about its pods, the oldest first."""
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        pods = {pod["metadata"]["uid"] for pod in await self.pods(job)}
        found: list[Body] = []
        async with self._doing("list the events"):
            async for page in self._api.list(EVENTS, self.namespace):
                found += page.items
        about = [(event, event.get("involvedObject", {})) for event in found]
        ours = [
            event
            for event, of in about
            if of.get("uid") in pods or (of.get("kind") == KIND and of.get("name") == name and of.get("uid") == uid)
        ]
        return sorted(ours, key=moment_of)

    async def change(self, name: str, spec: Body, *, what: str) -> Body:
        """A merge patch of the spec; the stored job. what: the change, such as "suspend the job"."""
        async with self._doing(what, name):
            return await self._api.patch(JOBS, self.namespace, name, {"spec": spec})

    async def scale(self, name: str, workers: int) -> int:
        """Asks for another number of workers; how many it asked for before."""
        job = await self.get(name)
        worker = job["spec"]["worker"]
        elastic = worker.get("elastic")
        before = int(worker.get("replicas", 1))
        if elastic is None and not job["spec"].get("suspend"):
            raise Rejected(
                f"{name} is not elastic: its job needs worker.elastic, such as {{minReplicas: 1, maxReplicas: 4}}, from its start; "
                "any job may change while it is suspended"
            )
        if elastic is not None and not elastic["minReplicas"] <= workers <= elastic["maxReplicas"]:
            raise Rejected(
                f"{workers} is outside of worker.elastic of {name}: choose {elastic['minReplicas']} to {elastic['maxReplicas']}"
            )
        await self.change(name, {"worker": {"replicas": workers}}, what="scale the job")
        return before

    async def delete(self, name: str) -> None:
        """Deletes a job, and with it its pods."""
        async with self._doing("delete the job", name):
            await self._api.delete(JOBS, self.namespace, name, uid="")

    @contextlib.asynccontextmanager
    async def _doing(self, what: str, job: str | None = None) -> AsyncIterator[None]:
        if job is not None:
            _check_name(job, of="a job")
        try:
            yield
        except ApiError as error:
            raise of_answer(error, what=what, namespace=self.namespace, job=job or "") from error


def _check_name(name: str, *, of: str) -> None:
    if not _NAME.fullmatch(name):
        raise Rejected(
            f"{name!r} is no name of {of}: it has lower case letters, digits and -, such as digits-2; `disttrain ls -A` lists all"
        )


def owns(job: Body, of: Body) -> bool:
    """Whether an object is the job's own; one of a job that had its name before is not."""
    uid = job["metadata"]["uid"]
    return any(owner["uid"] == uid for owner in of["metadata"].get("ownerReferences", ()))


def moment_of(event: Mapping[str, Any]) -> str:
    """When an Event last happened, RFC 3339."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp", ""))
