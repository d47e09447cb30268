"""`KubeApi` over kubernetes.aio.

Its configuration, TLS and connections are used, its typed models are not: parsing a list of 1000 pods into them costs seven times as much.
"""

import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from disttrain.api.names import FIELD_MANAGER
from disttrain.kube.api import (
    PODS,
    ApiError,
    Body,
    Conflict,
    NoCluster,
    NotFound,
    Page,
    Refused,
    Resource,
    Unavailable,
)

_NAMESPACE_OF_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
PAGE = 500
"""Objects in one page of a list. It bounds the memory that reading a list takes."""
WATCH_SECONDS = 50
"""After which the API server ends a watch; less than the silence that is taken for a lost connection."""
_SILENCE_SECONDS = 60.0
_MOST_OF_AN_ERROR = 1 << 16
_ANY = Resource("", "", "other", "")
"""Stands in the count of requests for what is asked for by its path."""
Count: TypeAlias = Callable[[str, str, str], None]
"""Called after each request with its verb, the plural of its resource, and the HTTP status as text, "none" without an answer."""


@contextlib.asynccontextmanager
async def connect(*, connections: int, context: str | None = None) -> AsyncIterator[ApiClient]:
    """A client of kubernetes.aio with the pod's service account, or outside a cluster with the current context of the kubeconfig.

    context: one of the kubeconfig, also in a pod. Raises NoCluster when there is neither.
    """
    configuration = Configuration()
    try:
        if context is not None:
            raise config.ConfigException("a context is asked for")
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except config.ConfigException:
        try:
            await config.load_kube_config(_kubeconfig(), context, configuration)  # type: ignore[no-untyped-call]
        except Exception as error:  # a file that is not a kubeconfig fails in many ways
            raise NoCluster(f"no cluster: {_one_line(error)}; set KUBECONFIG to a kubeconfig") from error
    configuration.connection_pool_maxsize = connections
    # Without trust_env=False aiohttp reads .netrc in a thread for every request. A proxy of the kubeconfig is still used.
    configuration.client_session_kwargs = {"trust_env": False, "middlewares": (_no_redirect,)}
    async with ApiClient(configuration) as client:
        yield client


def own_namespace(context: str | None = None) -> str:
    """The namespace of a context of the kubeconfig (None: the current one), or of the pod that this runs in; else "default"."""
    if context is None and _NAMESPACE_OF_POD.is_file():
        return _NAMESPACE_OF_POD.read_text().strip() or "default"
    try:
        contexts, current = config.list_kube_config_contexts(_kubeconfig())  # type: ignore[no-untyped-call]
    except Exception:  # `connect` says what is wrong with it
        return "default"
    chosen = next((one for one in contexts if one["name"] == context), None) if context is not None else current
    return str(((chosen or {}).get("context") or {}).get("namespace") or "default")


async def _no_redirect(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Refuses redirects. An API server sends none; a pod behind its proxy could send the operator to any address."""
    answer = await handler(request)
    if answer.status in (301, 302, 303, 307, 308):
        answer.close()
        raise aiohttp.ClientError(f"a redirect to {answer.headers.get('Location', '')[:200]} is not followed")
    return answer


async def whole_lines(
    pieces: AsyncIterator[bytes], *, rest_too: bool = False, most: int = 1 << 20
) -> AsyncGenerator[bytes, None]:
    """The lines of a stream, without their ends; one that is longer than `most` bytes in pieces of so many.

    rest_too: also what has no end, which of a stream that may have been cut off is no line.
    """
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
        while len(rest) > most:
            yield rest[:most]
            rest = rest[most:]
    if rest and rest_too:
        yield rest


async def beginning(content: aiohttp.StreamReader, most: int) -> bytes:
    """Reads up to `most` bytes of a body. A single read would return only what has arrived so far."""
    data = b""
    while len(data) < most and (more := await content.read(most - len(data))):
        data += more
    return data


def _kubeconfig() -> str:
    """The files that the environment names now; kubernetes.aio asks once, when it is imported."""
    return os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())


def _one_line(error: Exception) -> str:
    paths = _kubeconfig().split(os.pathsep)
    if not any(Path(path).exists() for path in paths):
        return f"there is no kubeconfig at {' or '.join(paths)}"
    if isinstance(error, config.ConfigException):
        return str(error)
    return f"the kubeconfig cannot be read: {' '.join(str(error).split())}"


class KubeClient:
    """`KubeApi` over kubernetes.aio. For one event loop."""

    def __init__(self, client: ApiClient, *, timeout_seconds: float, count: Count = lambda *_: None) -> None:
        self._client = client
        self._count = count
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
            try:
                metadata = answer["metadata"]
                page = Page(answer["items"] or [], int(metadata["resourceVersion"]))
            except (KeyError, TypeError, ValueError) as error:  # JSON of a program in between
                raise _unreadable("GET", resource.path(namespace), "no list", json.dumps(answer)) from error
            yield page
            if not (follows := metadata.get("continue")):
                return
            query["continue"] = follows

    async def create(self, resource: Resource, namespace: str, body: Body, *, dry_run: bool = False) -> Body:
        return await self._request(
            "POST",
            "create",
            resource,
            resource.path(namespace),
            # Without it the API server drops a misspelt field of a template silently.
            query={"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {}),
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
        options: Body = {"propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        return await self._request("DELETE", "delete", resource, resource.path(namespace, name), body=options)

    async def ask(self, path: str, body: Body | None = None) -> Body:
        """A GET of any path, such as one of discovery; with a body a POST, as for a review of rights. Raises ApiError."""
        method, verb = ("POST", "create") if body else ("GET", "get")
        return await self._request(method, verb, _ANY, path, body=body)

    async def proxy(self, namespace: str, pod: str, port: int, path: str, *, most: int) -> bytes:
        where = PODS.path(namespace, f"{pod}:{port}", "proxy", path.lstrip("/"))
        return await self._exchange("GET", "proxy", PODS, where, most=most)

    async def log(
        self,
        namespace: str,
        pod: str,
        container: str,
        *,
        follow: bool = False,
        since: str = "",
        tail: int | None = None,
        previous: bool = False,
    ) -> AsyncIterator[bytes]:
        query = {"container": container, "timestamps": "true"}
        query |= {"follow": "true"} if follow else {}
        query |= {"sinceTime": since} if since else {}
        query |= {"tailLines": str(tail)} if tail is not None else {}
        query |= {"previous": "true"} if previous else {}
        pieces = self._stream("log", PODS, PODS.path(namespace, pod, "log"), query)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def watch(
        self, resource: Resource, namespace: str, *, version: int, selector: str = "", fields: str = ""
    ) -> AsyncIterator[Body]:
        query = {"watch": "true", "resourceVersion": str(version), "timeoutSeconds": str(WATCH_SECONDS)}
        query |= {name: value for name, value in (("labelSelector", selector), ("fieldSelector", fields)) if value}
        path = resource.path(namespace)
        pieces = self._stream("watch", resource, path, query)
        async with contextlib.aclosing(pieces):
            async for line in whole_lines(pieces):
                try:
                    event = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise _unreadable("GET", path, "no event", line) from error
                yield event

    async def _stream(
        self, verb: str, resource: Resource, path: str, query: dict[str, str]
    ) -> AsyncGenerator[bytes, None]:
        url = f"{self._client.configuration.host}{path}?{urlencode(query)}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout.total, sock_read=_SILENCE_SECONDS)
        code = "none"
        try:
            headers = await self._headers("application/json", "application/json, */*")
            answer = await self._client.call_api("GET", url, headers, _request_timeout=timeout)
            async with answer.response as response:
                code = str(answer.status)
                if answer.status >= 400:
                    data = await beginning(response.content, _MOST_OF_AN_ERROR)
                    raise _error(answer.status, data, answer.headers.get("Retry-After"))
                async for piece in response.content.iter_any():
                    yield piece
        except (aiohttp.ClientError, OSError, TimeoutError, config.ConfigException) as error:
            raise Unavailable(0, type(error).__name__, f"no answer to GET {path}: {error}") from error
        finally:
            self._count(verb, resource.plural, code)

    async def _request(self, method: str, verb: str, resource: Resource, path: str, **more: Any) -> Body:
        data = await self._exchange(method, verb, resource, path, **more)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:  # the answer of a proxy in between, or one that was cut off
            raise _unreadable(method, path, "not JSON", data) from error
        if not isinstance(answer, dict):
            raise _unreadable(method, path, "no object", data)
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
            # ConfigException: the service account's token cannot be read again, or the kubeconfig's plugin returns none.
            raise Unavailable(0, type(error).__name__, f"no answer to {method} {path}: {error}") from error
        finally:
            self._count(verb, resource.plural, code)
        if answer.status >= 400:
            raise _error(answer.status, data, answer.headers.get("Retry-After"))
        return data

    async def _headers(self, content_type: str, accept: str) -> dict[str, str]:
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": FIELD_MANAGER}
        # For each request, since kubernetes.aio reads the service account's token again when it has expired.
        for setting in (await self._client.configuration.auth_settings()).values():
            headers[setting["key"]] = setting["value"]
        return headers


def _unreadable(method: str, path: str, what: str, answer: bytes | str) -> Unavailable:
    return Unavailable(0, "Unreadable", f"the answer to {method} {path} is {what}: {answer[:100]!r}")


def _error(status: int, data: bytes, retry_after: str | None) -> ApiError:
    fields: tuple[str, ...] = ()
    try:
        answer = json.loads(data)
        reason, message = str(answer.get("reason", "")), str(answer.get("message", ""))
        causes = (answer.get("details") or {}).get("causes") or ()
        fields = tuple(str(cause.get("field", "")) for cause in causes)
    except (ValueError, AttributeError, TypeError, RecursionError):  # a proxy in between, or a pod behind ours
        reason, message = "", data[:500].decode(errors="replace")
    kind: type[ApiError] = Refused
    if status == 404:
        kind = NotFound
    elif status == 409:
        kind = Conflict
    elif status in (401, 408, 429) or status >= 500:
        kind = Unavailable
    wait = float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None
    return kind(status, reason, message, wait, fields)
