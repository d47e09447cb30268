"""What the operator knows of the cluster: one `Store` a kind, filled by the watch, by the resync and by our own writes.

Of a pod only what decisions need is kept (`project_pod`), never the body. Three sources write, in no order, so the newest version of an
object wins: resource versions of one kind are integers that grow (KEP-5504), and a uid that was seen to be gone never comes back.
Not here: requests, decisions.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

from disttrain.api.gangs import LABEL_KUEUE_QUEUE
from disttrain.api.names import GROUP, KIND, LABEL_JOB_NAME, MANAGED_BY
from disttrain.api.stored import ReadJob, read_stored
from disttrain.controller.projection import project_pod
from disttrain.kube.api import CHILDREN, JOBS, PODS, VOLCANO_GROUPS, Body, Resource
from disttrain.plan.model import PodView

T = TypeVar("T")
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


class Known(NamedTuple):
    """How much a store has taken in until a moment."""

    newest: int
    """The highest version of an object."""
    deletions: int
    """How many objects were seen to be gone."""


class _Gone(NamedTuple):
    """An object that was seen to be gone."""

    number: int
    """Of the deletion: how many were seen before it."""
    version: int
    """The newest that was known of the object; 0: none."""


class Store(Generic[T]):
    """The objects of one kind, by name and by the job that owns them."""

    def __init__(self, project: Callable[[Body], T]) -> None:
        self._project = project
        self._by_key: dict[Key, Entry[T]] = {}
        self._by_owner: dict[tuple[str, str], dict[Key, Entry[T]]] = {}
        """By namespace and uid of the owner: an owner is always of the same namespace, whatever an object of another one claims."""
        self._gone: OrderedDict[str, _Gone] = OrderedDict()
        self.known = Known(newest=0, deletions=0)

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._by_key.values())

    def get(self, key: Key) -> Entry[T] | None:
        return self._by_key.get(key)

    def owned_by(self, namespace: str, uid: str) -> Iterable[Entry[T]]:
        """The children of the job of that uid, which are in its own namespace."""
        return self._by_owner.get((namespace, uid), {}).values()

    def put(self, body: Body) -> Entry[T] | None:
        """Takes an object in. The entry when that changed what we know, None for old news."""
        metadata = body["metadata"]
        key, uid, version = (
            Key(metadata["namespace"], metadata["name"]),
            metadata["uid"],
            int(metadata["resourceVersion"]),
        )
        known = self._by_key.get(key)
        self.known = self.known._replace(newest=max(self.known.newest, version))
        if uid in self._gone or (known and version <= known.version):
            return None
        if known and known.uid != uid:
            self._remove(known)
        job, owner = belongs_to(metadata)
        entry = Entry(key, uid, version, job, owner, self._project(body))
        self._by_key[key] = entry
        if owner:
            self._by_owner.setdefault((key.namespace, owner), {})[key] = entry
        changed = known is None or known.uid != uid or known.value != entry.value or known.owner != owner
        return entry if changed else None

    def drop(self, key: Key, uid: str) -> Entry[T] | None:
        """Forgets an object for ever. The entry that was removed, None when we did not have it."""
        entry = self._by_key.get(key)
        known = entry if entry is not None and entry.uid == uid else None
        self._gone.setdefault(uid, _Gone(number=self.known.deletions, version=known.version if known else 0))
        self.known = self.known._replace(deletions=self.known.deletions + 1)
        if len(self._gone) > TOMBSTONES:
            self._gone.popitem(last=False)
        if known is not None:
            self._remove(known)
        return known

    def contradicts(self, body: Body, version: int, before: Known) -> bool:
        """Whether a full list of that version shows an older state of an object than one that we know from before the list, or one that
        was gone before it, as it was then. before: what was known when the list was asked for."""
        metadata = body["metadata"]
        shown, gone = int(metadata["resourceVersion"]), self._gone.get(metadata["uid"])
        if gone is not None:
            return gone.number < before.deletions and shown <= gone.version
        known = self._by_key.get(Key(metadata["namespace"], metadata["name"]))
        return known is not None and known.uid == metadata["uid"] and shown < known.version <= version

    def vanished(self, uids: set[str], version: int) -> list[Entry[T]]:
        """What we have that a full list of that version has not: objects whose deletion was missed."""
        return [entry for entry in self if entry.uid not in uids and entry.version <= version]

    def _remove(self, entry: Entry[T]) -> None:
        del self._by_key[entry.key]
        owner = (entry.key.namespace, entry.owner)
        if entry.owner and (siblings := self._by_owner.get(owner)) is not None:
            siblings.pop(entry.key, None)
            if not siblings:
                del self._by_owner[owner]


class StoredJob:
    """A job as the API server has it, parsed when first needed."""

    def __init__(self, body: Body) -> None:
        body["metadata"].pop("managedFields", None)  # half of the body, and the operator does not read it
        self._body = body

    def __eq__(self, other: object) -> bool:
        """Whether a pass would see the same. Other labels than that of a queue do not count, and no annotations: they may change a
        thousand times a second."""
        return self._decides == other._decides if isinstance(other, StoredJob) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def _decides(self) -> tuple[object, ...]:
        queue = (self._body["metadata"].get("labels") or {}).get(LABEL_KUEUE_QUEUE)
        return self.uid, self.generation, self.deleting, queue, self._body.get("spec"), self._body.get("status")

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
    def read(self) -> ReadJob:
        """The job, as far as this version understands what another one may have stored."""
        return read_stored(self._body)


@dataclass(frozen=True, slots=True)
class CachedPod:
    """A pod, reduced to what decisions need, and where it can be reached."""

    view: PodView | None
    """None when its labels are not those that the operator gave it: no other client may change them."""
    ip: str


class Cache:
    """All stores."""

    def __init__(self) -> None:
        self.jobs: Store[StoredJob] = Store(StoredJob)
        self.pods: Store[CachedPod] = Store(
            lambda body: CachedPod(project_pod(body), body.get("status", {}).get("podIP", ""))
        )
        others: dict[Resource, Store[Any]] = {resource: Store(lambda _: None) for resource in CHILDREN.values()}
        self.volcano_groups: Store[str] = Store(lambda body: str((body.get("status") or {}).get("phase") or ""))
        others[VOLCANO_GROUPS] = self.volcano_groups
        self.stores: dict[Resource, Store[Any]] = {JOBS: self.jobs, PODS: self.pods, **others}
        self.absent: frozenset[Resource] = frozenset()
        """Optional kinds that the API server does not have, or that the operator may not read."""

    def shows(self, resource: Resource, key: Key, owner: str) -> bool:
        """Whether a child of the job of that uid is there, and is one that the plan can see. Of Secrets nothing is known here."""
        store = self.stores.get(resource)
        entry = store.get(key) if store is not None else None
        blind = entry is None or (isinstance(entry.value, CachedPod) and entry.value.view is None)
        return not blind and entry is not None and entry.owner == owner


def belongs_to(metadata: Body) -> tuple[Key | None, str]:
    """The job that an object belongs to and the uid of its controller. A label alone makes a key, for a job that waits for the name.

    A later release may name the job by another version of its group: it is the same job.
    """
    namespace = metadata["namespace"]
    for reference in metadata.get("ownerReferences", ()):
        group = reference["apiVersion"].partition("/")[0]
        if reference.get("controller") and (group, reference["kind"]) == (GROUP, KIND):
            return Key(namespace, reference["name"]), reference["uid"]
    name = metadata.get("labels", {}).get(LABEL_JOB_NAME)
    return (Key(namespace, name) if name else None), ""
