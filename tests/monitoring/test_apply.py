"""`kubectl apply -k` of each overlay against a real API server with controllers: admission, Pod Security, roles, a second apply."""

import json
from collections.abc import Iterator

import pytest

from cluster.controlplane import ControlPlane
from cluster.programs import require
from monitoring.grafana import MONITORING

DEPLOY = MONITORING.parent
JOB = {
    "apiVersion": "disttrain.dev/v1alpha1",
    "kind": "DistTrainJob",
    "metadata": {"name": "mine", "namespace": "team"},
    "spec": {
        "strategy": {"type": "DataParallel"},
        "trainer": {"command": ["true"]},
        "worker": {"replicas": 1},
    },
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[ControlPlane]:
    """With everything applied."""
    require("apiserver")
    with ControlPlane(controllers=True, scheduler=True) as control_plane:
        control_plane.add_fake_nodes(1, resources={"ephemeral-storage": "100Gi"})
        # A warning would be that of the label pod-security.kubernetes.io/warn, or of a deprecated field.
        control_plane.kubectl("apply", "--warnings-as-errors", "-k", str(DEPLOY / "overlays" / "kind"))
        control_plane.kubectl("create", "namespace", "team")
        yield control_plane


@pytest.mark.parametrize(
    ("namespace", "name"),
    [
        ("disttrain-system", "disttrain-operator"),
        ("disttrain-monitoring", "prometheus"),
        ("disttrain-monitoring", "grafana"),
    ],
)
def test_pods_pass_the_restricted_pod_security_that_their_namespace_enforces(
    cluster: ControlPlane, namespace: str, name: str
) -> None:
    cluster.kubectl("wait", "--for=condition=Available", f"deployment/{name}", "-n", namespace, "--timeout=50s")
    labels = json.loads(cluster.kubectl("get", "namespace", namespace, "-o", "json"))["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_a_second_apply_changes_nothing(cluster: ControlPlane) -> None:
    lines = cluster.kubectl("apply", "-k", str(DEPLOY / "overlays" / "kind")).splitlines()
    assert [line for line in lines if not line.endswith(" unchanged")] == []
    assert cluster.kubectl("diff", "-k", str(DEPLOY / "overlays" / "kind")) == ""


@pytest.mark.parametrize("overlay", ["base", "overlays/monitoring"])
def test_the_other_overlays_are_accepted_too(cluster: ControlPlane, overlay: str) -> None:
    cluster.kubectl("apply", "--dry-run=server", "--warnings-as-errors", "-k", str(DEPLOY / overlay))


def allowed(cluster: ControlPlane, user: str, verb: str, resource: str) -> bool:
    # kubectl takes pods/log for the pod named log: a subresource is a flag
    name, _, subresource = resource.partition("/")
    words = ("auth", "can-i", verb, name, f"--subresource={subresource}", "-n", "team", "--as", user)
    return cluster.kubectl(*words, check=False).strip() == "yes"


@pytest.mark.parametrize(
    ("role", "may", "may_not"),
    [
        (
            "view",
            ["get disttrainjobs", "list disttrainjobs", "get disttrainjobs/scale"],
            [
                "create disttrainjobs",
                "delete disttrainjobs",
                "patch disttrainjobs/status",
                "update disttrainjobs/scale",
            ],
        ),
        (
            "edit",
            [
                "get disttrainjobs",
                "create disttrainjobs",
                "patch disttrainjobs",
                "delete disttrainjobs",
                "update disttrainjobs/scale",
            ],
            ["patch disttrainjobs/status", "update disttrainjobs/status"],
        ),
        ("admin", ["get disttrainjobs", "create disttrainjobs"], ["patch disttrainjobs/status"]),
    ],
)
def test_the_cluster_roles_of_people_reach_jobs(
    cluster: ControlPlane, role: str, may: list[str], may_not: list[str]
) -> None:
    user = f"{role}er"
    cluster.kubectl("create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}", "-n", "team")
    assert [each for each in may if not allowed(cluster, user, *each.split())] == []
    assert [each for each in may_not if allowed(cluster, user, *each.split())] == []


def test_prometheus_sees_pods_everywhere_and_nothing_else(cluster: ControlPlane) -> None:
    user = "system:serviceaccount:disttrain-monitoring:prometheus"
    assert allowed(cluster, user, "list", "pods")
    for verb, resource in (
        ("list", "secrets"),
        ("create", "pods"),
        ("get", "pods/log"),
        ("list", "nodes"),
        ("get", "disttrainjobs"),
    ):
        assert not allowed(cluster, user, verb, resource), f"{verb} {resource}"


def test_a_job_can_be_created_after_the_apply(cluster: ControlPlane) -> None:
    cluster.kubectl("create", "--dry-run=server", "-f", "-", input=JOB)


def test_delete_leaves_nothing(cluster: ControlPlane) -> None:
    cluster.kubectl("delete", "-k", str(DEPLOY / "overlays" / "kind"), "--timeout=50s")
    for kind in ("namespaces", "clusterroles", "clusterrolebindings", "customresourcedefinitions"):
        left = [each["metadata"]["name"] for each in json.loads(cluster.kubectl("get", kind, "-o", "json"))["items"]]
        assert [name for name in left if "disttrain" in name] == [], kind
