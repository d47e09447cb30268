"""The Secret with the certificate of an attempt, for network.tls Mutual. Its content is random, and made by who creates it."""

from typing import Any

from disttrain.api.job import DistTrainJob
from disttrain.api.names import ChildKind, child_name
from disttrain.manifests.owner import child_metadata


def build_secret(job: DistTrainJob) -> dict[str, Any]:
    """The Secret of the job's present attempt."""
    name = child_name(ChildKind.SECRET, job.metadata.name, job.metadata.uid, job.status.attempt or 1)
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": child_metadata(job, name),
        "type": "kubernetes.io/tls",
        "immutable": True,
    }
