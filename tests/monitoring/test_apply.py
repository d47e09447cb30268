"""`kubectl apply -k` of each overlay against a real API server with controllers: admission, Pod Security, roles, a second apply; the
overlay for one namespace by a user who is admin there and has no rights elsewhere."""

import json
import re
from collections.abc import Iterator

import pytest

from cluster.controlplane import ControlPlane
from cluster.kubectl import KubectlError
from cluster.processes import wait_for
from cluster.programs import require
from monitoring.grafana import MONITORING

DEPLOY = MONITORING.parent
JOB = {
    "apiVersion": "disttrain.dev/v1alpha1",
    "kind": "DistTrainJob",
    "metadata": {"name": "mine", "namespace": "team"},
    "spec": {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["true"]}, "worker": {"replicas": 1}},
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


def changed(lines: list[str]) -> list[str]:
    """What `kubectl apply` says that it changed. Of a PodDisruptionBudget it says so always: the selector is sent anew each time
    (patchStrategy: replace), and the API server writes nothing."""
    budget = "poddisruptionbudget.policy/"
    return [line for line in lines if not line.endswith(" unchanged") and not line.startswith(budget)]


def test_a_second_apply_changes_nothing(cluster: ControlPlane) -> None:
    lines = cluster.kubectl("apply", "-k", str(DEPLOY / "overlays" / "kind")).splitlines()
    assert changed(lines) == []
    assert cluster.kubectl("diff", "-k", str(DEPLOY / "overlays" / "kind")) == ""


@pytest.mark.parametrize("overlay", ["base", "overlays/monitoring"])
def test_the_other_overlays_are_accepted_too(cluster: ControlPlane, overlay: str) -> None:
    cluster.kubectl("apply", "--dry-run=server", "--warnings-as-errors", "-k", str(DEPLOY / overlay))


def allowed(cluster: ControlPlane, user: str, verb: str, resource: str, *, namespace: str = "team") -> bool:
    # kubectl takes pods/log for the pod named log: a subresource is a flag
    name, _, subresource = resource.partition("/")
    words = ("auth", "can-i", verb, name, f"--subresource={subresource}", "-n", namespace, "--as", user)
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


def test_kubectl_answers_what_the_script_for_kind_asks_about_an_example(cluster: ControlPlane) -> None:
    """Whose answer is imitated in tests/unit/deploy/test_kind.py."""
    script = (DEPLOY / "kind" / "up.sh").read_text()
    (columns,) = re.findall(r"^readonly FIELDS=(\S+)$", script, re.MULTILINE)
    (flags,) = re.findall(r'cluster_kubectl get -f "\$EXAMPLE" (.*) "custom-columns=\$FIELDS"\)', script)
    example = str(DEPLOY.parent / "examples" / "digits-ps.yaml")
    question = ("get", "-f", example, *flags.split(), f"custom-columns={columns}")
    assert cluster.kubectl(*question).strip() == ""
    cluster.kubectl("apply", "-f", example)
    cluster.kubectl(
        "patch", "dtj", "digits-ps", "--subresource=status", "--type=merge", "-p", '{"status":{"state":"Complete"}}'
    )
    rows = [line.split() for line in cluster.kubectl(*question).splitlines()]
    assert ["DistTrainJob", "default", "digits-ps", "Complete"] in rows
    assert all(len(row) == 4 for row in rows)


def test_delete_leaves_nothing(cluster: ControlPlane) -> None:
    # The namespace goes first, and its controller may have deleted what is in it before kubectl asks for that.
    cluster.kubectl("delete", "-k", str(DEPLOY / "overlays" / "kind"), "--ignore-not-found", "--timeout=50s")
    for kind in ("namespaces", "clusterroles", "clusterrolebindings", "customresourcedefinitions"):
        left = [each["metadata"]["name"] for each in json.loads(cluster.kubectl("get", kind, "-o", "json"))["items"]]
        assert [name for name in left if "disttrain" in name] == [], kind


ANN = "ann"
NAMESPACED = str(DEPLOY / "overlays" / "namespaced")


@pytest.fixture(scope="module")
def prepared() -> Iterator[ControlPlane]:
    """A cluster whose admin applied the prerequisites, and in which Ann is admin of the namespace default."""
    require("apiserver")
    with ControlPlane(controllers=True, scheduler=True) as control_plane:
        control_plane.add_fake_nodes(1, resources={"ephemeral-storage": "100Gi"})
        control_plane.kubectl("create", "namespace", "team")
        for role, user in (("admin", ANN), ("edit", "ed")):
            control_plane.kubectl(
                "create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}", "-n", "default"
            )
        control_plane.kubectl("apply", "--warnings-as-errors", "-k", str(DEPLOY / "cluster-prerequisites"))
        wait_for(
            "the controller that adds roles up to `admin`",
            lambda: "bind" in control_plane.kubectl("get", "clusterrole", "admin", "-o", "yaml"),
            30,
            programs=control_plane.programs,
        )
        yield control_plane


def test_the_prerequisites_start_nothing_and_give_no_right_by_themselves(prepared: ControlPlane) -> None:
    text = prepared.kubectl("get", "-k", str(DEPLOY / "cluster-prerequisites"), "-o", "name")
    kinds = {line.partition(".")[0] for line in text.split()}
    assert kinds == {"customresourcedefinition", "clusterrole"}


def test_the_admin_of_a_namespace_runs_an_operator_in_it(prepared: ControlPlane) -> None:
    prepared.kubectl("apply", "--warnings-as-errors", "-k", NAMESPACED, user=ANN)
    wait = ("wait", "--for=condition=Available", "deployment/disttrain-operator", "-n", "default", "--timeout=50s")
    prepared.kubectl(*wait, user=ANN)
    account = "system:serviceaccount:default:disttrain-operator"
    for verb, resource in (("patch", "disttrainjobs/status"), ("create", "pods"), ("watch", "disttrainjobs")):
        assert allowed(prepared, account, verb, resource, namespace="default"), f"{verb} {resource}"
        assert not allowed(prepared, account, verb, resource, namespace="team"), f"{verb} {resource}"
    again = prepared.kubectl("apply", "-k", NAMESPACED, user=ANN).splitlines()
    assert changed(again) == []


def test_the_right_to_bind_is_for_admins_for_their_namespace_and_for_this_role_alone(prepared: ControlPlane) -> None:
    def bind(role: str, *, user: str, namespace: str) -> None:
        account = f"--serviceaccount={namespace}:default"
        prepared.kubectl("create", "rolebinding", "more", f"--clusterrole={role}", account, "-n", namespace, user=user)

    for role, user, namespace in (
        ("disttrain-operator", ANN, "team"),
        ("disttrain-operator", "ed", "default"),
        ("cluster-admin", ANN, "default"),
        ("disttrain-operator-bind", "ed", "default"),
    ):
        with pytest.raises(KubectlError, match="forbidden"):
            bind(role, user=user, namespace=namespace)
    words = ("create", "clusterrolebinding", "more", "--clusterrole=disttrain-operator", f"--user={ANN}")
    with pytest.raises(KubectlError, match="forbidden"):
        prepared.kubectl(*words, user=ANN)
