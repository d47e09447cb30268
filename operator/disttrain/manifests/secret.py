"""The Secret with the certificate of an attempt, for network.tls Mutual."""

import base64
from collections.abc import Mapping
from typing import Any

from disttrain.api.job import DistTrainJob
from disttrain.api.names import secret_name
from disttrain.manifests.owner import child_metadata


def name_of_secret(job: DistTrainJob) -> str:
    """Its name, as status.certificate has it. Raises ValueError when that has none."""
    kept = job.status.certificate
    if kept is None:
        raise ValueError("status.certificate names no Secret")
    return secret_name(job.metadata.name, job.metadata.uid, kept.attempt, kept.suffix)


def build_secret(job: DistTrainJob, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The Secret with these files of a certificate."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": child_metadata(job, name_of_secret(job)),
        "type": "kubernetes.io/tls",
        "immutable": True,
        "data": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }
