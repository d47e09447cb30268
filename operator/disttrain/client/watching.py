"""Objects of a cluster as they are, and again after each change. From a watch, and where that is cut off or not permitted, from lists."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, Protocol

from disttrain.api.reasons import FINAL
from disttrain.client.errors import of_answer
from disttrain.kube.api import JOBS, ApiError, Body, KubeApi, Resource, Streams, Unavailable

AGAIN_SECONDS: Final = 1.0
"""Until what failed is asked again."""
_NO_RIGHT: Final = 403


class Api(KubeApi, Streams, Protocol):
    """All requests of a user."""


async def current(
    api: Api, resource: Resource, namespace: str, *, what: str, selector: str = "", fields: str = ""
) -> AsyncIterator[Mapping[str, Body]]:
    """The objects by name: those that are there now, and from then on after each change, without an end.

    what: the request, such as "list the pods". Raises ClusterError where the user may not list them, or the first list fails.
    """
    listed = False
    while True:
        objects: dict[str, Body] = {}
        version = 0
        try:
            async for page in api.list(resource, namespace, selector=selector, fields=fields):
                objects |= {str(one["metadata"]["name"]): one for one in page.items}
                version = page.version
        except ApiError as error:
            if not listed or error.status == _NO_RIGHT:
                raise of_answer(error, what=what, namespace=namespace) from error
            await asyncio.sleep(AGAIN_SECONDS)
            continue
        listed = True
        yield dict(objects)
        try:
            events = api.watch(resource, namespace, version=version, selector=selector, fields=fields)
            async for event in events:
                if not _take(event, objects):
                    break
                yield dict(objects)
        except Unavailable:
            await asyncio.sleep(AGAIN_SECONDS)
        except ApiError:  # a role without the verb watch, or a version that is too old
            await asyncio.sleep(AGAIN_SECONDS)


async def to_its_end(api: Api, job: Body) -> AsyncIterator[Body | None]:
    """A job now and after each change, up to its end; None as the last one where it was deleted. Raises ClusterError."""
    metadata = job["metadata"]
    name, uid, fields = metadata["name"], metadata["uid"], f"metadata.name={metadata['name']}"
    async for jobs in current(api, JOBS, metadata["namespace"], what="read the job", fields=fields):
        found = jobs.get(name)
        if found is None or found["metadata"]["uid"] != uid:
            yield None
            return
        yield found
        if (found.get("status") or {}).get("state") in FINAL:
            return


def _take(event: Mapping[str, Any], objects: dict[str, Body]) -> bool:
    """Notes a change; False where there is no such change, as in the error that ends a watch whose version is too old."""
    with contextlib.suppress(KeyError, TypeError):
        kind, object_ = event["type"], event["object"]
        if kind in ("ADDED", "MODIFIED"):
            objects[str(object_["metadata"]["name"])] = object_
            return True
        if kind == "DELETED":
            objects.pop(str(object_["metadata"]["name"]), None)
            return True
    return False
