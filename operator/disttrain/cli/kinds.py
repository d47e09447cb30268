"""Which kinds kubectl knows, so far as that can be said without a cluster.

The kinds of the API groups that every cluster has and that hardly ever change are listed; of other groups, custom resources among them,
only a cluster can tell. Not here: what a kind's fields are.
"""

import difflib
from typing import Final

from disttrain.api.names import API_VERSION, GROUP, KIND

CHECKED: Final = (KIND, "ConfigMap", "Secret", "PersistentVolumeClaim")
"""Kinds whose fields are checked here."""

_KINDS: Final[dict[str, tuple[str, ...]]] = {
    API_VERSION: (KIND,),
    "v1": (
        *(
            "ConfigMap",
            "Secret",
            "PersistentVolumeClaim",
            "PersistentVolume",
            "Namespace",
            "Node",
            "Pod",
            "PodTemplate",
        ),
        *("Service", "ServiceAccount", "Endpoints", "Event", "LimitRange", "ResourceQuota", "ReplicationController"),
        *("Binding", "ComponentStatus"),
    ),
    "apps/v1": ("ControllerRevision", "DaemonSet", "Deployment", "ReplicaSet", "StatefulSet"),
    "batch/v1": ("CronJob", "Job"),
    "policy/v1": ("PodDisruptionBudget", "Eviction"),
    "rbac.authorization.k8s.io/v1": ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"),
}


def is_checked(api_version: str, kind: str) -> bool:
    """Whether an object's fields are checked here. A custom resource may have the name of a kind of ours."""
    group = api_version.rpartition("/")[0]
    if kind == KIND:
        return True
    return kind in CHECKED and not ("." in group and not group.endswith(".k8s.io"))


def unknown(api_version: str, kind: str) -> str | None:
    """What is wrong with a kind that is not checked here; None for one that a cluster may have."""
    known = _KINDS.get(api_version)
    if known is not None and kind in known:
        return None
    ours = api_version.partition("/")[0] == GROUP
    hint = close(kind)
    if hint is not None and (known is not None or ours or not api_version):
        return f'unknown kind "{kind}"; did you mean "{hint}"?'
    if known is not None or ours:
        return f'unknown kind "{kind}": {api_version} has no such kind'
    if "/" not in api_version and api_version:
        return f'unknown kind "{kind}": Kubernetes has no API version {api_version} without a group'
    return None


def close(kind: str) -> str | None:
    """The kind that was probably meant."""
    same_word = [known for known in CHECKED if known.lower() == kind.lower()]
    return next(iter(same_word or difflib.get_close_matches(kind, CHECKED, 1, 0.8)), None)
