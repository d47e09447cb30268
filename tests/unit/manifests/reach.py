"""Who reaches a pod under a NetworkPolicy, as Kubernetes evaluates selectors."""

from collections.abc import Mapping
from typing import Any

Labels = Mapping[str, str]
Object = dict[str, Any]


def admits(policy: Object, *, namespace: str, namespace_labels: Labels, labels: Labels, port: int) -> bool:
    """Whether a pod of a namespace may connect to a TCP port of the pods that the policy is of."""
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    same = namespace == policy["metadata"]["namespace"]
    return any(
        _has_port(rule, port) and any(_is(peer, labels, namespace_labels, same=same) for peer in rule["from"])
        for rule in policy["spec"]["ingress"]
    )


def _has_port(rule: Object, port: int) -> bool:
    return "ports" not in rule or {"protocol": "TCP", "port": port} in rule["ports"]


def _is(peer: Object, labels: Labels, namespace_labels: Labels, *, same: bool) -> bool:
    assert peer.keys() <= {"podSelector", "namespaceSelector"}
    there = _matches(peer["namespaceSelector"], namespace_labels) if "namespaceSelector" in peer else same
    return there and _matches(peer.get("podSelector", {}), labels)


def _matches(selector: Object, labels: Labels) -> bool:
    assert selector.keys() <= {"matchLabels"}
    wanted: Labels = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()
