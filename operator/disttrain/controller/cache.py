"""What the operator knows of the cluster: one `Store` a kind, filled by the watch, by the resync and by our own writes.

Of a pod only what decisions need is kept (`project_pod`), never the body. Three sources write, in no order, so the newest version of an
object wins: resource versions of one kind are integers that grow (KEP-5504), and a uid that was seen to be gone never comes back.
Not here: requests, decisions.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import ValidationError

from disttrain.api import DistTrainJob, Termination
from disttrain.api.names import (
    API_VERSION,
    KIND,
    LABEL_ATTEMPT,
    LABEL_INDEX,
    LABEL_JOB_NAME,
    LABEL_ROLE,
    MANAGED_BY,
    TRAINER_CONTAINER,
    Role,
)
from disttrain.controller.api import JOBS, NETWORK_POLICIES, PODS, SERVICES, Body, Resource
from disttrain.plan.model import DISRUPTED, Phase, PodView

T = TypeVar("T")
_NOT_STARTED = frozenset({"StartError", "ContainerCannotRun"})
_WORDS_OF_NOT_STARTED = (
    (re.compile(r"(?<![\w/])exec:? .*(executable file not found|no such file or directory)"), 127),
    (re.compile(r"(?<![\w/])exec:? .*permission denied"), 126),
)
_TROUBLE_OF_THE_NODE = re.compile(r"unable to retrieve OCI runtime error|hook")
"""A runtime or a hook that is not there is no mistake of the job: another node may have it."""
TOMBSTONES = 20_000
"""Uids of the newest deletions that are remembered: far more than can be on their way."""


class Key(NamedTuple):
    """Namespace and name: of a job, and what the queue holds; or of a child."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """An object of the cache."""

    key: Key
    uid: str
    version: int
    job: Key | None
    """The job that the object belongs to, or says so by its label; None: to no job."""
    owner: str
    """The uid of the job that controls the object, "" when none does."""
    value: T


class Store(Generic[T]):
    """The objects of one kind, by name and by the job that owns them."""

    def __init__(self, project: Callable[[Body], T]) -> None:
        self._project = project
        self._by_key: dict[Key, Entry[T]] = {}
        self._by_owner: dict[str, dict[Key, Entry[T]]] = {}
        self._gone: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._by_key.values())

    def get(self, key: Key) -> Entry[T] | None:
        return self._by_key.get(key)

    def owned_by(self, uid: str) -> Iterable[Entry[T]]:
        return self._by_owner.get(uid, {}).values()

    def put(self, body: Body) -> Entry[T] | None:
        """Takes an object in. The entry when that changed what we know, None for old news."""
        metadata = body["metadata"]
        key, uid, version = (
            Key(metadata["namespace"], metadata["name"]),
            metadata["uid"],
            int(metadata["resourceVersion"]),
        )
        known = self._by_key.get(key)
        if uid in self._gone or (known and version <= known.version):
            return None
        if known and known.uid != uid:
            self._remove(known)
        job, owner = belongs_to(metadata)
        entry = Entry(key, uid, version, job, owner, self._project(body))
        self._by_key[key] = entry
        if owner:
            self._by_owner.setdefault(owner, {})[key] = entry
        changed = known is None or known.uid != uid or known.value != entry.value or known.owner != owner
        return entry if changed else None

    def drop(self, key: Key, uid: str) -> Entry[T] | None:
        """Forgets an object for ever. The entry that was removed, None when we did not have it."""
        self._gone[uid] = None
        if len(self._gone) > TOMBSTONES:
            self._gone.popitem(last=False)
        known = self._by_key.get(key)
        if known is None or known.uid != uid:
            return None
        self._remove(known)
        return known

    def vanished(self, uids: set[str], version: int) -> list[Entry[T]]:
        """What we have that a full list of that version has not: objects whose deletion was missed."""
        return [entry for entry in self if entry.uid not in uids and entry.version <= version]

    def _remove(self, entry: Entry[T]) -> None:
        del self._by_key[entry.key]
        if entry.owner and (siblings := self._by_owner.get(entry.owner)) is not None:
            siblings.pop(entry.key, None)
            if not siblings:
                del self._by_owner[entry.owner]


class StoredJob:
    """A job as the API server has it, parsed when first needed."""

    def __init__(self, body: Body) -> None:
        body["metadata"].pop("managedFields", None)  # half of the body, and nobody here reads it
        self._body = body

    @property
    def uid(self) -> str:
        return str(self._body["metadata"]["uid"])

    @property
    def version(self) -> str:
        return str(self._body["metadata"]["resourceVersion"])

    @property
    def generation(self) -> int:
        return int(self._body["metadata"].get("generation", 1))

    @property
    def deleting(self) -> bool:
        return "deletionTimestamp" in self._body["metadata"]

    @property
    def ours(self) -> bool:
        """Whether spec.managedBy names this operator; asked before parsing, for what another controller's jobs hold is not our concern."""
        return bool((self._body.get("spec") or {}).get("managedBy", MANAGED_BY) == MANAGED_BY)

    @property
    def status(self) -> Body:
        return self._body.get("status") or {}

    @cached_property
    def parsed(self) -> DistTrainJob | ValidationError:
        """The job, or why it is none: it may have been stored under the schema of another version."""
        try:
            return DistTrainJob.parse(self._body)
        except ValidationError as error:
            return error


@dataclass(frozen=True, slots=True)
class CachedPod:
    """A pod, reduced to what decisions need, and where it can be reached."""

    view: PodView | None
    """None when its labels are not those that the operator gave it: nobody may change them."""
    ip: str


class Cache:
    """All stores."""

    def __init__(self) -> None:
        self.jobs: Store[StoredJob] = Store(StoredJob)
        self.pods: Store[CachedPod] = Store(
            lambda body: CachedPod(project_pod(body), body.get("status", {}).get("podIP", ""))
        )
        self.services: Store[None] = Store(lambda _: None)
        self.network_policies: Store[None] = Store(lambda _: None)
        self.stores: dict[Resource, Store[Any]] = {
            JOBS: self.jobs,
            PODS: self.pods,
            SERVICES: self.services,
            NETWORK_POLICIES: self.network_policies,
        }


def belongs_to(metadata: Body) -> tuple[Key | None, str]:
    """The job that an object belongs to and the uid of its controller. A label alone makes a key, for whoever waits for the name."""
    namespace = metadata["namespace"]
    for reference in metadata.get("ownerReferences", ()):
        if reference.get("controller") and reference["kind"] == KIND and reference["apiVersion"] == API_VERSION:
            return Key(namespace, reference["name"]), reference["uid"]
    name = metadata.get("labels", {}).get(LABEL_JOB_NAME)
    return (Key(namespace, name) if name else None), ""


def project_pod(body: Body) -> PodView | None:
    """The PodView of a pod's body, or of its metadata alone when it was just made; None when it has not the labels of a job's pod."""
    metadata, spec, status = body["metadata"], body.get("spec", {}), body.get("status", {})
    labels = metadata.get("labels", {})
    try:
        role, index, attempt = Role(labels[LABEL_ROLE]), int(labels[LABEL_INDEX]), int(labels[LABEL_ATTEMPT])
    except (KeyError, ValueError):
        return None
    conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
    true = frozenset(type_ for type_, condition in conditions.items() if condition["status"] == "True")
    phase = Phase(status.get("phase", Phase.PENDING))
    state = _trainer_state(status)
    ended = state.get("terminated", {})
    reason, message = _why(status, state, conditions)
    finished = ended.get("finishedAt") or (_last_transition(conditions) if phase is Phase.FAILED else None)
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        role=role,
        index=index,
        attempt=attempt,
        phase=phase,
        created=_time(metadata["creationTimestamp"]),
        ready="Ready" in true,
        scheduled="PodScheduled" in true or bool(spec.get("nodeName")),
        deleting="deletionTimestamp" in metadata,
        deletion_deadline=_time(metadata["deletionTimestamp"]) if "deletionTimestamp" in metadata else None,
        finished=_time(finished) if finished else None,
        exit_code=_exit_code(ended),
        reason=reason,
        message=message,
        termination=Termination.decode(ended["message"]) if ended.get("message") else Termination(),
        conditions=true,
        disruption=conditions[DISRUPTED].get("reason", "") if DISRUPTED in true else "",
        node=spec.get("nodeName", ""),
    )


def _trainer_state(status: Body) -> Body:
    for container in status.get("containerStatuses", ()):
        if container["name"] == TRAINER_CONTAINER:
            state: Body = container.get("state", {})
            return state
    return {}


def _exit_code(ended: Body) -> int | None:
    """The container's. A runtime says 128 when it could not start the program; why, as a shell's 126 and 127 have it, is in its words."""
    message = ended.get("message", "")
    if ended.get("reason") in _NOT_STARTED and not _TROUBLE_OF_THE_NODE.search(message):
        for words, meaning in _WORDS_OF_NOT_STARTED:
            if words.search(message):
                return meaning
    code: int | None = ended.get("exitCode")
    return code


def _why(status: Body, state: Body, conditions: dict[str, Body]) -> tuple[str, str]:
    """Why the pod failed or waits. The pod's own reason (Evicted) says more than its container's (Error)."""
    if status.get("reason"):
        return status["reason"], status.get("message", "")
    if ended := state.get("terminated"):
        return ended.get("reason", ""), ""
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        if waiting := container.get("state", {}).get("waiting"):
            return waiting.get("reason", ""), waiting.get("message", "")
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return scheduled.get("reason", ""), scheduled.get("message", "")
    return "", ""


def _last_transition(conditions: dict[str, Body]) -> str | None:
    return max((c["lastTransitionTime"] for c in conditions.values() if c.get("lastTransitionTime")), default=None)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
