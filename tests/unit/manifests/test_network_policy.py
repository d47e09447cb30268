"""Who reaches the pods of a job, by the selectors of its NetworkPolicy."""

import pytest

from disttrain.api.names import CONTROL_PORT, METRICS_PORT, RENDEZVOUS_PORT, SERVER_PORT
from disttrain.manifests.network_policy import build_network_policy
from unit.manifests.jobs import job
from unit.manifests.reach import Labels, admits

PEER = {"disttrain.dev/job-name": "digits", "disttrain.dev/role": "worker"}
OPERATOR = {"app.kubernetes.io/name": "disttrain-operator"}
ALL = {METRICS_PORT, CONTROL_PORT, RENDEZVOUS_PORT, SERVER_PORT, 40_123}
"""40_123: gloo's sockets have any port."""
METRICS = {METRICS_PORT}


@pytest.mark.parametrize(
    ("namespace", "namespace_labels", "labels", "ports"),
    [
        pytest.param("team", {}, PEER, ALL, id="a peer"),
        pytest.param("team", {}, {"disttrain.dev/job-name": "other"}, set(), id="a pod of another job"),
        pytest.param("team", {}, {}, set(), id="any pod of the namespace"),
        pytest.param("other", {}, PEER, set(), id="a pod elsewhere with the job's labels"),
        pytest.param("team", {}, OPERATOR, METRICS, id="the namespace's own operator"),
        pytest.param("disttrain-system", {"disttrain.dev/operator": "true"}, OPERATOR, METRICS, id="the operator"),
        pytest.param("disttrain-system", {"disttrain.dev/operator": "true"}, {}, set(), id="a pod beside it"),
        pytest.param("other", {}, OPERATOR, set(), id="a pod elsewhere that poses as the operator"),
        pytest.param("prometheus", {"disttrain.dev/monitoring": "true"}, {"a": "b"}, METRICS, id="monitoring"),
        pytest.param("prometheus", {"disttrain.dev/monitoring": "false"}, {}, set(), id="no monitoring"),
    ],
)
def test_peers_reach_all_ports_and_operators_and_monitoring_the_metrics(
    namespace: str, namespace_labels: Labels, labels: Labels, ports: set[int]
) -> None:
    policy = build_network_policy(job())
    assert policy["spec"]["podSelector"] == {"matchLabels": {"disttrain.dev/job-name": "digits"}}
    found = {
        port
        for port in ALL
        if admits(policy, namespace=namespace, namespace_labels=namespace_labels, labels=labels, port=port)
    }
    assert found == ports


def test_a_metrics_port_of_ones_own_is_the_one_that_is_open() -> None:
    policy = build_network_policy(job(observability={"metricsPort": 9999}))
    monitoring = {"namespace": "p", "namespace_labels": {"disttrain.dev/monitoring": "true"}, "labels": {}}
    assert admits(policy, port=9999, **monitoring)
    assert not admits(policy, port=METRICS_PORT, **monitoring)
