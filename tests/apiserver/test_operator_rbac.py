"""The operator's Role: it suffices for the whole life of a job, and it is exactly what is written down beside this test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from apiserver.operating import (
    EVENTS,
    JOBS,
    PODS,
    POLICIES,
    SERVICES,
    Kubelet,
    Operator,
    Rest,
    eventually,
    job,
    pod_names,
)
from cluster.controlplane import ControlPlane

ACCOUNT = "system:serviceaccount:disttrain-system:disttrain-operator"
GOLDEN = Path(__file__).with_name("operator_can_i.txt")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rest(control_plane: ControlPlane) -> Rest:
    for namespace in ("disttrain-system", "rbac"):
        control_plane.kubectl("create", "namespace", namespace)
    control_plane.kubectl("apply", "-k", str(ROOT / "deploy/base/rbac"))
    return Rest(control_plane, "rbac")


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane, rest: Rest) -> Iterator[Operator]:
    config = control_plane.kubeconfig_for(ACCOUNT)
    with Operator(
        control_plane, "--namespaces=rbac", "--progress=Pod", kubeconfig=config, name="operator-rbac"
    ) as operator:
        yield operator


def test_role_suffices_for_the_life_of_a_job(rest: Rest, operator: Operator) -> None:
    kubelet = Kubelet(rest)
    rest.create(JOBS, job("life", runPolicy={"ttlSecondsAfterFinished": 1}))
    eventually(lambda: sorted(pod["metadata"]["name"] for pod in rest.list(PODS)) == pod_names("life"))
    for path, name in ((SERVICES, "life"), (POLICIES, "life"), (PODS, "life-ps-0")):
        rest.delete(path, name, **({"gracePeriodSeconds": 0} if path == PODS else {}))
        eventually(lambda path=path, name=name: rest.find(path, name))
    for name in pod_names("life"):
        kubelet.run(name)
    kubelet.fail("life-worker-0")
    eventually(lambda: rest.get(PODS, "life-worker-0")["status"]["phase"] == "Pending")
    eventually(lambda: [event for event in rest.list(EVENTS) if event["involvedObject"]["name"] == "life"])
    for name in pod_names("life"):
        kubelet.succeed(name)
    eventually(lambda: rest.find(JOBS, "life") is None)
    refused = {
        request: count for request, count in operator.requests(writes=False).items() if request[2] in ("401", "403")
    }
    assert refused == {}
    assert "forbidden" not in operator.log


def test_role_is_what_is_written_down(control_plane: ControlPlane, rest: Rest) -> None:
    listed = control_plane.kubectl("auth", "can-i", "--list", f"--as={ACCOUNT}", "-n", "rbac")
    rights = sorted(
        re.sub(r" {2,}", "  ", line).rstrip() for line in listed.splitlines() if not line.startswith("Resources")
    )
    # What every account may (discovery, questions about itself) differs between versions of Kubernetes.
    own = [line for line in rights if not line.startswith(" ") and "selfsubject" not in line]
    assert own == GOLDEN.read_text().splitlines(), "\n".join(own)


def test_role_has_no_wildcard_and_no_secret() -> None:
    (role,) = yaml.safe_load_all((ROOT / "deploy/base/rbac/role.yaml").read_text())
    for rule in role["rules"]:
        assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])
        assert not {"secrets", "pods/exec", "pods/proxy"} & set(rule["resources"])
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_namespaced_variant_has_the_same_rules_and_nothing_of_the_cluster(control_plane: ControlPlane) -> None:
    text = control_plane.kubectl("kustomize", str(ROOT / "deploy/overlays/namespaced"))
    objects = {(body["kind"], body["metadata"]["name"]): body for body in yaml.safe_load_all(text)}
    assert {kind for kind, _ in objects} == {"ServiceAccount", "Role", "RoleBinding", "Deployment"}
    (role,) = yaml.safe_load_all((ROOT / "deploy/base/rbac/role.yaml").read_text())
    assert objects["Role", "disttrain-operator"]["rules"] == role["rules"]
