"""An API server in memory that keeps a log of its versions. `tests/apiserver/test_contract.py` holds it against the real one.

Bodies are shared between all who ask for them, so nobody may change one: a change makes a new body. What it leaves out: schemas, defaults,
admission (a test of its own refuses what it likes, see client.py), other kinds than the operator asks for.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from disttrain.kube.api import JOBS, PODS, Body, Conflict, NotFound, Resource

DEFAULT_GRACE_SECONDS = 30
ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class Change:
    """One version of one object, as a watch reports it."""

    version: int
    type: str
    """ADDED, MODIFIED or DELETED."""
    body: Body


class ApiServer:
    """The objects, and how they came to be."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._objects: dict[Resource, dict[tuple[str, str], Body]] = {}
        self._log: dict[Resource, list[Change]] = {}
        self.version = 100
        self._uids = itertools.count(1)
        self.absent: frozenset[Resource] = frozenset()
        """Kinds that it does not have: a client that asks for one is told so."""
        self.changed: Callable[[Resource, Change], None] = lambda *_: None
        """Called after each change."""
        self.admit: Callable[[Resource, Body], Body] = lambda _, body: body
        """What the schema makes of an object that is written: it leaves out what it does not know, and gives defaults."""

    # What a client asks for

    def check(self, resource: Resource) -> None:
        """Raises NotFound for a kind that it does not have."""
        if resource in self.absent:
            raise NotFound(404, "NotFound", "the server could not find the requested resource")

    def get(self, resource: Resource, namespace: str, name: str) -> Body:
        try:
            return self._objects[resource][namespace, name]
        except KeyError:
            raise NotFound(404, "NotFound", f'{resource.plural} "{name}" not found') from None

    def list(
        self, resource: Resource, namespace: str | None, *, selector: str = "", fields: str = "", at: int | None = None
    ) -> tuple[list[Body], int]:
        """The objects and the version of the list: the newest one, or an older one."""
        objects = self._objects.get(resource, {}) if at is None else self._as_of(resource, at)
        found = [
            body
            for (where, _), body in objects.items()
            if namespace in (None, where) and _selected(body, selector) and _has_fields(body, fields)
        ]
        return found, self.version if at is None else at

    def create(self, resource: Resource, namespace: str, body: Body) -> Body:
        """Returns the whole object; a client that asks for the metadata alone gets less."""
        name = body["metadata"].get("name") or f"{body['metadata']['generateName']}{next(self._uids):05}"
        if (namespace, name) in self._objects.get(resource, {}):
            raise Conflict(409, "AlreadyExists", f'{resource.plural} "{name}" already exists')
        metadata = {
            **body["metadata"],
            "name": name,
            "namespace": namespace,
            "uid": f"{next(self._uids):08x}-0000-4000-8000-000000000000",
            "creationTimestamp": self._stamp(0),
        }
        made = {**body, "metadata": metadata}
        if resource is JOBS:
            made["metadata"]["generation"] = 1
            made.pop("status", None)
        if resource is PODS:
            made["status"] = {"phase": "Pending"}
        return self._store(resource, "ADDED", made)

    def patch(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        """A merge patch of everything but the status, where the kind has a subresource for it."""
        if resource in (JOBS, PODS):
            patch = {field: value for field, value in patch.items() if field != "status"}
        return self._patch(resource, namespace, name, patch)

    def patch_status(self, resource: Resource, namespace: str, name: str, patch: Body) -> Body:
        about = {field: value for field, value in patch.items() if field in ("metadata", "status")}
        return self._patch(resource, namespace, name, about, status=True)

    def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str = "", grace_seconds: int | None = None
    ) -> Body:
        body = self.get(resource, namespace, name)
        metadata = body["metadata"]
        if uid and metadata["uid"] != uid:
            found = f"UID in precondition: {uid}, UID in object meta: {metadata['uid']}"
            raise Conflict(409, "Conflict", f"Precondition failed: {found}")
        grace = self._grace(body, grace_seconds) if resource is PODS else 0
        if not grace and not metadata.get("finalizers"):
            return self._remove(resource, body)
        before = metadata.get("deletionGracePeriodSeconds")
        if before is not None and (grace_seconds is None or grace >= before):
            return body
        deleting = {"deletionTimestamp": self._stamp(grace), "deletionGracePeriodSeconds": grace}
        return self._store(resource, "MODIFIED", {**body, "metadata": {**metadata, **deleting}})

    # What a watch asks for

    def since(self, resource: Resource, version: int) -> Iterable[Change]:
        """The changes after a version."""
        return [change for change in self._log.get(resource, ()) if change.version > version]

    # What happens to it

    def restore(self, version: int) -> None:
        """A backup of that version takes the place of what it has. Its next versions were given out before, to other objects."""
        for resource in list(self._objects):
            self._objects[resource] = self._as_of(resource, version)
            self._log[resource] = [change for change in self._log[resource] if change.version <= version]
        self.version = version

    # Parts

    def _patch(self, resource: Resource, namespace: str, name: str, patch: Body, *, status: bool = False) -> Body:
        body = self.get(resource, namespace, name)
        metadata = body["metadata"]
        given = patch.get("metadata", {})
        if given.get("resourceVersion", metadata["resourceVersion"]) != metadata["resourceVersion"]:
            raise Conflict(
                409, "Conflict", "the object has been modified; please apply your changes to the latest version"
            )
        own = {} if status else {key: value for key, value in given.items() if key not in ("uid", "resourceVersion")}
        rest = {field: value for field, value in patch.items() if field != "metadata"}
        after = self.admit(resource, merged(body, {"metadata": own, **rest}))
        if after == body:
            return body
        if resource is JOBS and after.get("spec") != body.get("spec"):
            after["metadata"] = {**after["metadata"], "generation": metadata["generation"] + 1}
        if (
            "deletionTimestamp" in after["metadata"]
            and not after["metadata"].get("finalizers")
            and resource is not PODS
        ):
            return self._remove(resource, after)
        return self._store(resource, "MODIFIED", after)

    def _grace(self, pod: Body, asked: int | None) -> int:
        """Seconds. A pod without a node, or that has ended, has nothing to end."""
        if not pod["spec"].get("nodeName") or pod["status"].get("phase") in ENDED:
            return 0
        own: int = pod["spec"].get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
        return own if asked is None else asked

    def _store(self, resource: Resource, type_: str, body: Body) -> Body:
        self.version += 1
        body = self.admit(resource, {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}})
        key = body["metadata"]["namespace"], body["metadata"]["name"]
        self._objects.setdefault(resource, {})[key] = body
        self._tell(resource, Change(self.version, type_, body))
        return body

    def _remove(self, resource: Resource, body: Body) -> Body:
        """Pods and Services are returned as they were last, of other kinds it is only said that it is done."""
        self.version += 1
        body = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        del self._objects[resource][body["metadata"]["namespace"], body["metadata"]["name"]]
        self._tell(resource, Change(self.version, "DELETED", body))
        if resource is PODS:
            gone = {"deletionTimestamp": self._stamp(0), "deletionGracePeriodSeconds": 0}
            return {**body, "metadata": {**body["metadata"], **gone}}
        return {"kind": "Status", "status": "Success", "details": {"uid": body["metadata"]["uid"]}}

    def _tell(self, resource: Resource, change: Change) -> None:
        self._log.setdefault(resource, []).append(change)
        self.changed(resource, change)

    def _as_of(self, resource: Resource, version: int) -> dict[tuple[str, str], Body]:
        objects: dict[tuple[str, str], Body] = {}
        for change in self._log.get(resource, ()):
            if change.version > version:
                break
            key = change.body["metadata"]["namespace"], change.body["metadata"]["name"]
            if change.type == "DELETED":
                objects.pop(key, None)
            else:
                objects[key] = change.body
        return objects

    def _stamp(self, seconds: float) -> str:
        return (self._clock() + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def merged(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def _selected(body: Body, selector: str) -> bool:
    """Whether it meets a label selector such as a=b, or a."""
    labels = body["metadata"].get("labels") or {}
    for wanted in filter(None, selector.split(",")):
        name, equal, value = wanted.partition("=")
        if name not in labels or (equal and labels[name] != value):
            return False
    return True


def _has_fields(body: Body, fields: str) -> bool:
    """Whether it meets a field selector such as involvedObject.kind=Pod,reason=FailedMount."""
    for path, _, value in (each.partition("=") for each in fields.split(",") if each):
        found: Any = body
        for part in path.split("."):
            found = found.get(part, "")
        if found != value:
            return False
    return True
