"""The objects that a job is made of, as the dicts that the API server takes. Pure: a job in, a manifest out; no client, no clock."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from disttrain.api.job import DistTrainJob
from disttrain.api.names import ChildKind
from disttrain.manifests.environment import cluster_addresses, training_environment
from disttrain.manifests.network_policy import build_network_policy
from disttrain.manifests.pod import build_pod
from disttrain.manifests.pod_group import build_coscheduling_group, build_volcano_group
from disttrain.manifests.secret import build_secret
from disttrain.manifests.service import build_service
from disttrain.manifests.size import TooLarge, too_large

CHILDREN: Mapping[ChildKind, Callable[[DistTrainJob], dict[str, Any]]] = MappingProxyType(
    {
        ChildKind.SERVICE: build_service,
        ChildKind.NETWORK_POLICY: build_network_policy,
        ChildKind.COSCHEDULING_GROUP: build_coscheduling_group,
        ChildKind.VOLCANO_GROUP: build_volcano_group,
    }
)
"""The manifest of a job's object of each kind."""

__all__ = [
    "CHILDREN",
    "TooLarge",
    "build_network_policy",
    "build_pod",
    "build_secret",
    "build_service",
    "cluster_addresses",
    "too_large",
    "training_environment",
]
