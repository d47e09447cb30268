"""The objects that a job is made of, as the dicts that the API server takes. Pure: a job in, a manifest out; no client, no clock."""

from disttrain.manifests.environment import cluster_addresses, training_environment
from disttrain.manifests.network_policy import build_network_policy
from disttrain.manifests.pod import build_pod
from disttrain.manifests.service import build_service
from disttrain.manifests.size import TooLarge, too_large

__all__ = [
    "TooLarge",
    "build_network_policy",
    "build_pod",
    "build_service",
    "cluster_addresses",
    "too_large",
    "training_environment",
]
