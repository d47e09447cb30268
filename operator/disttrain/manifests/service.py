"""The headless Service: a stable name for every pod, one write for all of them. It balances nothing."""

from typing import Any

from disttrain.api.job import DistTrainJob
from disttrain.api.names import CONTROL_PORT, LABEL_JOB_NAME, RENDEZVOUS_PORT, SERVER_PORT, service_name
from disttrain.manifests.owner import child_metadata


def build_service(job: DistTrainJob) -> dict[str, Any]:
    """The Service of a job."""
    # Those of every strategy: a suspended job may change its own.
    ports = {"rendezvous": RENDEZVOUS_PORT, "control": CONTROL_PORT, "server": SERVER_PORT}
    ports["metrics"] = job.spec.observability.metrics_port
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": child_metadata(job, service_name(job.metadata.name)),
        "spec": {
            "clusterIP": "None",
            # Peers look one another up in order to become ready; a name that waits for readiness would wait for ever.
            "publishNotReadyAddresses": True,
            "selector": {LABEL_JOB_NAME: job.metadata.name},
            "ports": [
                {"name": name, "port": port, "targetPort": port, "protocol": "TCP"} for name, port in ports.items()
            ],
        },
    }
