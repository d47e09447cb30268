"""The API server, as the operator talks to it: raw objects in and out, and errors that say what to do about them.

`KubeApi` is all that the rest of the operator knows; `KubeClient` is it over kubernetes.aio, whose configuration, TLS and connections we
use, and whose typed models we do not: parsing a list of 1000 pods into them costs seven times as much. Nothing is repeated or slept
through in here: an `Unavailable` goes back to the queue, which knows when to try again.

    ApiError
    ├── NotFound       404
    ├── Conflict       409  it exists already, or is not the one we meant (uid, resourceVersion)
    ├── Refused        400, 403, 405, 422 …  the same request will not succeed until something changes
    └── Unavailable    401, 408, 429, 5xx, no answer or none that can be read: the very same request may succeed later
"""

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from disttrain.api.names import FIELD_MANAGER, GROUP, KIND, PLURAL, VERSION
from disttrain.controller.metrics import API_REQUESTS

Body: TypeAlias = dict[str, Any]

PAGE = 500
"""Objects of a list in one answer: bounds the memory that a resync takes."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of namespaced object: where it is found."""

    prefix: str
    plural: str
    kind: str

    def path(self, namespace: str | None, *rest: str) -> str:
        scope = (f"namespaces/{namespace}",) if namespace else ()
        return "/".join((self.prefix, *scope, self.plural, *rest))


JOBS = Resource(f"/apis/{GROUP}/{VERSION}", PLURAL, KIND)
PODS = Resource("/api/v1", "pods", "Pod")
SERVICES = Resource("/api/v1", "services", "Service")
NETWORK_POLICIES = Resource("/apis/networking.k8s.io/v1", "networkpolicies", "NetworkPolicy")
EVENTS = Resource("/api/v1", "events", "Event")
LEASES = Resource("/apis/coordination.k8s.io/v1", "leases", "Lease")


class ApiError(Exception):
    """The API server said no. `reason` is its one word, such as AlreadyExists."""

    def __init__(
        self, status: int, reason: str, message: str, retry_after: float | None = None, fields: tuple[str, ...] = ()
    ) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        """Seconds, where the server said how long to leave it alone."""
        self.fields = fields
        """Fields of the object that it calls wrong, such as status.training.loss."""


class NotFound(ApiError): ...


class Conflict(ApiError): ...


class Refused(ApiError): ...


class Unavailable(ApiError): ...


class NoCluster(Exception):
    """Neither a pod's account nor a kubeconfig says where the cluster is."""


class KubeApi(Protocol):
    """What the operator needs of an API server."""

    async def get(self, resource: Resource, namespace: str, name: str) -> Body: ...

    def list(
        self, resource: Resource, namespace: str | None, *, selector: str = "", fields: str = ""
    ) -> "AsyncIterator[Page]":
        """All objects, or those with such labels and fields; page by page, all as of one resource version."""
        ...

    async def create(self, resource: Resource, namespace: str, body: Body) -> Body:
        """Makes an object; Refused when it has a field that the server does not know. The answer is its metadata alone: the rest is
        what was sent, and costs both sides time."""
        ...

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        """A merge patch (RFC 7386)."""
        ...

    async def patch_status(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        """A merge patch of the status subresource; with a resourceVersion in it, a Conflict when the object moved on."""
        ...

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> Body:
        """Deletes this very object, in the background for what it owns. Conflict when the name is another's by now."""
        ...

    async def proxy(self, namespace: str, pod: str, port: int, path: str, *, most: int) -> bytes:
        """What a pod answers to a GET, through the API server; at most so many bytes of it."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list."""

    items: list[Body]
    version: int
    """The resource version that the whole list is of."""


@contextlib.asynccontextmanager
async def connect(*, connections: int) -> AsyncIterator[ApiClient]:
    """kubernetes.aio for the pod's own account, or outside a cluster for the current context of the kubeconfig."""
    configuration = Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except config.ConfigException:
        try:
            await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        except Exception as error:  # a file that is no kubeconfig fails in as many ways as there are other files
            raise NoCluster(f"no cluster: {_one_line(error)}; set KUBECONFIG to a kubeconfig") from error
    configuration.connection_pool_maxsize = connections
    # Else aiohttp looks for a .netrc in a thread of its own, for every single request. A proxy of the kubeconfig is still used.
    configuration.client_session_kwargs = {"trust_env": False, "middlewares": (_no_redirect,)}
    async with ApiClient(configuration) as client:
        yield client


async def _no_redirect(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """An API server sends nobody elsewhere; a pod behind its proxy could, to wherever it likes."""
    answer = await handler(request)
    if answer.status in (301, 302, 303, 307, 308):
        answer.close()
        raise aiohttp.ClientError(f"a redirect to {answer.headers.get('Location', '')[:200]} is not followed")
    return answer


async def beginning(content: aiohttp.StreamReader, most: int) -> bytes:
    """A body, or its first bytes: a single read gives no more than what has come so far."""
    data = b""
    while len(data) < most and (more := await content.read(most - len(data))):
        data += more
    return data


def _one_line(error: Exception) -> str:
    if isinstance(error, config.ConfigException):
        return str(error)
    return f"the kubeconfig cannot be read: {' '.join(str(error).split())}"


class KubeClient:
    """`KubeApi` over kubernetes.aio."""

    def __init__(self, client: ApiClient, *, timeout_seconds: float) -> None:
        self._client = client
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)

    async def get(self, resource: Resource, namespace: str, name: str) -> Body:
        return await self._request("GET", "get", resource, resource.path(namespace, name))

    async def list(
        self, resource: Resource, namespace: str | None, *, selector: str = "", fields: str = ""
    ) -> AsyncIterator[Page]:
        chosen = {"labelSelector": selector, "fieldSelector": fields}
        query = {"limit": str(PAGE), **{name: value for name, value in chosen.items() if value}}
        while True:
            answer = await self._request("GET", "list", resource, resource.path(namespace), query=query)
            metadata = answer["metadata"]
            yield Page(answer["items"], int(metadata["resourceVersion"]))
            if not (follows := metadata.get("continue")):
                return
            query["continue"] = follows

    async def create(self, resource: Resource, namespace: str, body: Body) -> Body:
        return await self._request(
            "POST",
            "create",
            resource,
            resource.path(namespace),
            # Else a misspelt field of a template is dropped without a word, and with it what the user wanted.
            query={"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"},
            body=body,
            accept="application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json",
        )

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        return await self._patch(resource, resource.path(namespace, name), patch)

    async def patch_status(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        return await self._patch(resource, resource.path(namespace, name, "status"), patch)

    async def _patch(self, resource: Resource, path: str, patch: Body) -> Body:
        query = {"fieldManager": FIELD_MANAGER}
        return await self._request(
            "PATCH", "patch", resource, path, query=query, body=patch, content_type="application/merge-patch+json"
        )

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> Body:
        options: Body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        return await self._request("DELETE", "delete", resource, resource.path(namespace, name), body=options)

    async def proxy(self, namespace: str, pod: str, port: int, path: str, *, most: int) -> bytes:
        where = PODS.path(namespace, f"{pod}:{port}", "proxy", path.lstrip("/"))
        return await self._exchange("GET", "proxy", PODS, where, most=most)

    async def _request(self, method: str, verb: str, resource: Resource, path: str, **more: Any) -> Body:
        data = await self._exchange(method, verb, resource, path, **more)
        try:
            answer: Body = json.loads(data)
        except ValueError as error:  # of a proxy in between, or cut off
            raise Unavailable(0, "Unreadable", f"the answer to {method} {path} is no JSON: {data[:100]!r}") from error
        return answer

    async def _exchange(
        self,
        method: str,
        verb: str,
        resource: Resource,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Body | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        most: int | None = None,
    ) -> bytes:
        url = f"{self._client.configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        code = "none"
        try:
            answer = await self._client.call_api(
                method, url, await self._headers(content_type, accept), body=body, _request_timeout=self._timeout
            )
            data: bytes
            if most is None:
                data = await answer.read()  # type: ignore[no-untyped-call]
            else:
                async with answer.response as response:
                    data = await beginning(response.content, most)
            code = str(answer.status)
        except (aiohttp.ClientError, OSError, TimeoutError, config.ConfigException) as error:
            # ConfigException: the account's token cannot be read anew, or the kubeconfig's plugin gives none.
            raise Unavailable(0, type(error).__name__, f"no answer to {method} {path}: {error}") from error
        finally:
            API_REQUESTS.labels(verb, resource.plural, code).inc()
        if answer.status >= 400:
            raise _error(answer.status, data, answer.headers.get("Retry-After"))
        return data

    async def _headers(self, content_type: str, accept: str) -> dict[str, str]:
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": FIELD_MANAGER}
        # Asked each time: it is kubernetes.aio that knows when the account's token has to be read anew.
        for setting in (await self._client.configuration.auth_settings()).values():
            headers[setting["key"]] = setting["value"]
        return headers


def _error(status: int, data: bytes, retry_after: str | None) -> ApiError:
    fields: tuple[str, ...] = ()
    try:
        answer = json.loads(data)
        reason, message = str(answer.get("reason", "")), str(answer.get("message", ""))
        causes = (answer.get("details") or {}).get("causes") or ()
        fields = tuple(str(cause.get("field", "")) for cause in causes)
    except (ValueError, AttributeError):  # a proxy in between, or a pod behind ours
        reason, message = "", data[:500].decode(errors="replace")
    kind: type[ApiError] = Refused
    if status == 404:
        kind = NotFound
    elif status == 409:
        kind = Conflict
    elif status in (401, 408, 429) or status >= 500:
        kind = Unavailable
    wait = float(retry_after) if retry_after and retry_after.isdigit() else None
    return kind(status, reason, message, wait, fields)
