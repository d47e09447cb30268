"""What a program needs of a Kubernetes API server (`KubeApi`), the kinds of objects that it asks for, and the errors that it can get.

ApiError
├── NotFound       404
├── Conflict       409  it exists already, or is not the one we meant (uid, resourceVersion)
├── Refused        400, 403, 405, 422 …  the same request will not succeed until something changes
└── Unavailable    401, 408, 429, 5xx, no answer or none that can be read: the very same request may succeed later
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

from disttrain.api.names import GROUP, KIND, PLURAL, POD_GROUPS, VERSION, ChildKind

Body: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of namespaced object, and where the API server has it. `group` is "" for the core group."""

    group: str
    version: str
    plural: str
    kind: str

    @property
    def full_name(self) -> str:
        """With its group, as kubectl has it; of a custom resource the name of its CRD."""
        return ".".join(filter(None, (self.plural, self.group)))

    def path(self, namespace: str | None, *rest: str) -> str:
        scope = (f"namespaces/{namespace}",) if namespace else ()
        prefix = f"/apis/{self.group}" if self.group else "/api"
        return "/".join((prefix, self.version, *scope, self.plural, *rest))


JOBS = Resource(GROUP, VERSION, PLURAL, KIND)
PODS = Resource("", "v1", "pods", "Pod")
SERVICES = Resource("", "v1", "services", "Service")
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
COSCHEDULING_GROUPS = Resource("scheduling.x-k8s.io", "v1alpha1", "podgroups", "PodGroup")
VOLCANO_GROUPS = Resource("scheduling.volcano.sh", "v1beta1", "podgroups", "PodGroup")
SECRETS = Resource("", "v1", "secrets", "Secret")
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap")
CLAIMS = Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
EVENTS = Resource("", "v1", "events", "Event")
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")

CHILDREN: Mapping[ChildKind, Resource] = MappingProxyType(
    {
        ChildKind.SERVICE: SERVICES,
        ChildKind.NETWORK_POLICY: NETWORK_POLICIES,
        ChildKind.COSCHEDULING_GROUP: COSCHEDULING_GROUPS,
        ChildKind.VOLCANO_GROUP: VOLCANO_GROUPS,
    }
)
"""Where the API server has a job's object of each kind."""
OPTIONAL = frozenset(CHILDREN[kind] for kind in POD_GROUPS)
"""Kinds that a cluster need not have."""


class ApiError(Exception):
    """The API server refused a request, or did not answer it. `reason` is its one-word reason, such as AlreadyExists."""

    def __init__(
        self, status: int, reason: str, message: str, retry_after: float | None = None, fields: tuple[str, ...] = ()
    ) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        """Seconds until the next request, where the server asked for such a pause; else None."""
        self.fields = fields
        """Fields of the object that the server rejects, such as status.training.loss."""


class NotFound(ApiError): ...


class Conflict(ApiError): ...


class Refused(ApiError): ...


class Unavailable(ApiError): ...


class NoCluster(Exception):
    """Neither a pod's account nor a kubeconfig says where the cluster is."""


class KubeApi(Protocol):
    """The requests. Each raises an ApiError, and none is repeated here: the caller knows when to try again."""

    async def get(self, resource: Resource, namespace: str, name: str) -> Body: ...

    def list(
        self, resource: Resource, namespace: str | None, *, selector: str = "", fields: str = ""
    ) -> "AsyncIterator[Page]":
        """All objects, or those with such labels and fields; page by page, all as of one resource version."""
        ...

    async def create(self, resource: Resource, namespace: str, body: Body, *, dry_run: bool = False) -> Body:
        """Creates an object; Refused when it has a field that the server does not know. Returns the metadata alone: the rest is
        what was sent, and would cost both sides time. dry_run: the server checks it, and keeps nothing."""
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
        """Deletes the object of that uid ("": the object of that name); what it owns is deleted in the background. Conflict when another
        object has the name now."""
        ...

    async def proxy(self, namespace: str, pod: str, port: int, path: str, *, most: int) -> bytes:
        """The first `most` bytes of what a pod answers to a GET, through the API server."""
        ...


class Streams(Protocol):
    """Answers that go on for as long as the caller reads them. Each raises an ApiError."""

    def log(
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
        """The log of a container as the kubelet sends it, in pieces of any size: its lines with their time before them.

        follow: until the container ends. since: RFC 3339, whole seconds. tail: only so many last lines. previous: of the container that
        this one replaced in its pod. Unavailable where nothing comes for a minute: the other side may be gone.
        """
        ...

    def watch(
        self, resource: Resource, namespace: str, *, version: int, selector: str = "", fields: str = ""
    ) -> AsyncIterator[Body]:
        """The changes since a list, as {type, object}; ends by itself after less than a minute."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list."""

    items: list[Body]
    version: int
    """The resource version that the whole list is of."""
