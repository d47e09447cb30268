"""The NetworkPolicy of network.policy JobOnly: who reaches the pods of a job.

| who | ports |
|---|---|
| the job's own pods | all |
| operators: in the job's namespace, or in one labelled disttrain.dev/operator=true | that of the metrics, for /progress |
| every pod of a namespace labelled disttrain.dev/monitoring=true | that of the metrics |

Who may label a namespace is an administrator, so no tenant lets themselves in. Policies add up: another one may let in more.
Not here: encryption (network.tls). Egress stays open: a training fetches its data from where it likes, such as data.url, and no
policy could name the addresses of an object store.
"""

from typing import Any

from disttrain.api.job import DistTrainJob
from disttrain.api.names import LABEL_JOB_NAME, LABEL_MONITORING, LABEL_OPERATOR, OPERATOR_POD
from disttrain.manifests.owner import child_metadata


def build_network_policy(job: DistTrainJob) -> dict[str, Any]:
    """The NetworkPolicy of a job."""
    own_pods = {"podSelector": {"matchLabels": {LABEL_JOB_NAME: job.metadata.name}}}
    operators = {"podSelector": {"matchLabels": dict(OPERATOR_POD)}}
    readers = [
        operators,
        {"namespaceSelector": {"matchLabels": {LABEL_OPERATOR: "true"}}, **operators},
        {"namespaceSelector": {"matchLabels": {LABEL_MONITORING: "true"}}},
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": child_metadata(job, job.metadata.name),
        "spec": {
            **own_pods,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [own_pods]},
                {"from": readers, "ports": [{"protocol": "TCP", "port": job.spec.observability.metrics_port}]},
            ],
        },
    }
