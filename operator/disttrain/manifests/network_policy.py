"""The NetworkPolicy of network.policy JobOnly: the job's pods talk to one another, any client may read the metrics.

Not here: encryption (network.tls). Egress stays open: a training fetches its data from where it likes, such as data.url, and no
policy could name the addresses of an object store.
"""

from typing import Any

from disttrain.api.job import DistTrainJob
from disttrain.api.names import LABEL_JOB_NAME
from disttrain.manifests.owner import child_metadata


def build_network_policy(job: DistTrainJob) -> dict[str, Any]:
    """The NetworkPolicy of a job."""
    own_pods = {"podSelector": {"matchLabels": {LABEL_JOB_NAME: job.metadata.name}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": child_metadata(job, job.metadata.name),
        "spec": {
            **own_pods,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [own_pods]},
                {"ports": [{"protocol": "TCP", "port": job.spec.observability.metrics_port}]},
            ],
        },
    }
