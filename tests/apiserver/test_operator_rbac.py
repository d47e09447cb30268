"""The operator's Role: it suffices for the whole life of a job, all of it is used, and it is exactly what stands beside this test."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver.meddling import Meddler, Watches
from apiserver.operating import (
    EVENTS,
    JOBS,
    PODS,
    POLICIES,
    SECRETS,
    SERVICES,
    Operator,
    Rest,
    eventually,
    job,
    pod_names,
    stamp,
)
from apiserver.playing import Kubelet, Master
from cluster.controlplane import ControlPlane

ACCOUNT = "system:serviceaccount:disttrain-system:disttrain-operator"
GOLDEN = Path(__file__).with_name("operator_can_i.txt")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rest(control_plane: ControlPlane) -> Iterator[Rest]:
    """Under the policy that narrows what the role cannot."""
    for namespace in ("disttrain-system", "rbac"):
        control_plane.kubectl("create", "namespace", namespace)
    control_plane.kubectl("apply", "-k", str(ROOT / "deploy/base/rbac"))
    narrowed = str(ROOT / "deploy/components/admission/operator.yaml")
    control_plane.kubectl("apply", "-f", narrowed)
    yield Rest(control_plane, "rbac")
    control_plane.kubectl("delete", "-f", narrowed)


@pytest.fixture(scope="module")
def meddler(control_plane: ControlPlane) -> Iterator[Meddler]:
    with Meddler(control_plane, user=ACCOUNT) as meddler:
        yield meddler


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane, rest: Rest, meddler: Meddler) -> Iterator[Operator]:
    flags = ("--namespaces=rbac", "--progress=Pod")
    with Operator(control_plane, *flags, kubeconfig=meddler.kubeconfig, name="operator-rbac") as operator:
        yield operator


def granted(rules: Any) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def names_are_taken_and_given_back(rest: Rest) -> None:
    """Whose an object is that has the name of a child, the operator has to look up."""
    pod = {"containers": [{"name": "x", "image": "x"}]}
    service = {"clusterIP": "None", "selector": {"x": "y"}}
    for path, name, spec in (
        (SERVICES, "taken", service),
        (POLICIES, "taken", {"podSelector": {}}),
        (PODS, "taken-master-0", pod),
    ):
        rest.create(path, {"metadata": {"name": name}, "spec": spec})
    rest.create(JOBS, job("taken"))
    eventually(lambda: "NameTaken" in str(rest.get(JOBS, "taken")["status"]["conditions"]))
    for path, name in ((SERVICES, "taken"), (POLICIES, "taken"), (PODS, "taken-master-0")):
        rest.delete(path, name, **({"gracePeriodSeconds": 0} if path == PODS else {}))
    selector = "disttrain.dev/job-name=taken"
    eventually(
        lambda: sorted(pod["metadata"]["name"] for pod in rest.list(PODS, selector)) == pod_names("taken"), seconds=30
    )


def child_loses_its_label(rest: Rest, path: str, name: str) -> None:
    """By which the operator knows it: it is deleted and made again."""
    uid = rest.get(path, name)["metadata"]["uid"]
    rest.merge(f"{path}/{name}", {"metadata": {"labels": {"disttrain.dev/job-name": None}}})
    eventually(lambda: rest.get(path, name)["metadata"]["uid"] != uid)


def attempt_begins(rest: Rest, name: str) -> None:
    """With a certificate of its own; that of the former attempt goes."""
    for suspend in (True, False):
        rest.merge(f"{JOBS}/{name}", {"spec": {"suspend": suspend}})
        eventually(lambda: bool(rest.pods_of(name)) is not suspend)  # noqa: B023
    selector = f"disttrain.dev/job-name={name}"
    eventually(lambda: ["-tls-2-" in one["metadata"]["name"] for one in rest.list(SECRETS, selector)] == [True])


def pod_waits_for_a_volume(rest: Rest, kubelet: Kubelet, name: str) -> None:
    kubelet.place(name, "node-1")
    kubelet.wait(name)
    kubelet.tell(name, "FailedMount", 'MountVolume.SetUp failed for volume "x" : secret "nope" not found')
    eventually(lambda: "SecretNotFound" in str(rest.get(JOBS, "life")["status"]["conditions"]), seconds=30)


def rule_of_health_suspends(rest: Rest, kubelet: Kubelet, name: str) -> None:
    with Master() as master:
        master.report |= {"step": 10, "loss": 5.0, "lastUpdateTime": stamp()}
        rule = {"name": "diverged", "metric": "Loss", "above": 1, "forSeconds": 0, "action": "Suspend"}
        rest.create(JOBS, job(name, health={"rules": [rule]}, observability=master.observability))
        eventually(lambda: sorted(rest.pods_of(name)) == pod_names(name))
        for pod in pod_names(name):
            kubelet.run(pod, ip="127.0.0.1")
        eventually(lambda: rest.get(JOBS, name)["spec"].get("suspend") is True)


def worker_fails(rest: Rest, kubelet: Kubelet) -> None:
    uid = rest.get(PODS, "life-worker-0")["metadata"]["uid"]
    kubelet.fail("life-worker-0")
    eventually(lambda: rest.get(PODS, "life-worker-0")["metadata"]["uid"] != uid)


def test_role_suffices_for_the_life_of_a_job_and_nothing_of_it_is_idle(
    rest: Rest, operator: Operator, meddler: Meddler
) -> None:
    kubelet = Kubelet(rest)
    names_are_taken_and_given_back(rest)
    rule_of_health_suspends(rest, kubelet, "ruled")
    selector = "disttrain.dev/job-name=life"
    rest.create(JOBS, job("life", runPolicy={"ttlSecondsAfterFinished": 1}, network={"tls": "Mutual"}))
    eventually(lambda: sorted(pod["metadata"]["name"] for pod in rest.list(PODS, selector)) == pod_names("life"))
    for path, name in ((SERVICES, "life"), (POLICIES, "life"), (PODS, "life-ps-0")):
        rest.delete(path, name, **({"gracePeriodSeconds": 0} if path == PODS else {}))
        eventually(lambda path=path, name=name: rest.find(path, name))
    child_loses_its_label(rest, SERVICES, "life")
    attempt_begins(rest, "life")
    pod_waits_for_a_volume(rest, kubelet, "life-ps-0")
    rest.merge(f"{JOBS}/life", {"spec": {"network": {"policy": "None"}}})
    eventually(lambda: rest.find(POLICIES, "life") is None)
    for name in pod_names("life"):
        kubelet.run(name)
    worker_fails(rest, kubelet)
    worker_fails(rest, kubelet)  # the same Event again
    # A status that is written over a change that the operator has not seen.
    meddler.meddled_with, meddler.watches = "disttrainjobs", Watches.MUTED
    rest.merge(f"{JOBS}/life", {"metadata": {"annotations": {"example.org/note": "x"}}})
    worker_fails(rest, kubelet)
    meddler.watches = Watches.PASSED
    eventually(lambda: [event for event in rest.list(EVENTS) if event["involvedObject"]["name"] == "life"])
    for name in pod_names("life"):
        kubelet.succeed(name)
    eventually(lambda: rest.find(JOBS, "life") is None)
    refused = {
        request: count
        for request, count in operator.requests(writes=False).items()
        # PodGroups: a right of deploy/components/gang-scheduling.
        if request[2] in ("401", "403") and request != ("list", "podgroups", "403")
    }
    assert refused == {}
    assert "forbidden" not in operator.log
    (role,) = yaml.safe_load_all((ROOT / "deploy/base/rbac/role.yaml").read_text())
    unasked = {
        # Asked for by the API server itself, of a client that sets blockOwnerDeletion.
        ("disttrain.dev", "disttrainjobs/finalizers", "update"),
    }
    needed = granted(role["rules"]) - unasked
    # What a request does can be seen before its answer passes the proxy: the job is gone a moment before its deletion is "allowed".
    eventually(lambda: needed <= meddler.allowed)
    assert meddler.allowed == needed


def test_role_is_what_is_written_down(control_plane: ControlPlane, rest: Rest) -> None:
    listed = control_plane.kubectl("auth", "can-i", "--list", f"--as={ACCOUNT}", "-n", "rbac")
    rights = sorted(
        re.sub(r" {2,}", "  ", line).rstrip() for line in listed.splitlines() if not line.startswith("Resources")
    )
    # What every account may (discovery, questions about itself) differs between versions of Kubernetes.
    own = [line for line in rights if not line.startswith(" ") and "selfsubject" not in line]
    assert own == GOLDEN.read_text().splitlines(), "\n".join(own)


def test_role_has_no_wildcard_and_reads_no_secrets() -> None:
    (role,) = yaml.safe_load_all((ROOT / "deploy/base/rbac/role.yaml").read_text())
    for rule in role["rules"]:
        assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])
        assert not {"pods/exec", "pods/proxy"} & set(rule["resources"])
        assert "secrets" not in rule["resources"] or set(rule["verbs"]) == {"create", "delete"}
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_namespaced_variant_has_the_same_rules_and_nothing_of_the_cluster(control_plane: ControlPlane) -> None:
    def render(folder: str) -> dict[tuple[str, str], Any]:
        text = control_plane.kubectl("kustomize", str(ROOT / folder))
        return {(body["kind"], body["metadata"]["name"]): body for body in yaml.safe_load_all(text)}

    objects = render("deploy/overlays/namespaced")
    assert {kind for kind, _ in objects} == {
        "ServiceAccount", "Role", "RoleBinding", "Deployment", "PodDisruptionBudget"
    }  # fmt: skip
    bound = objects["RoleBinding", "disttrain-operator"]["roleRef"]
    (role,) = yaml.safe_load_all((ROOT / "deploy/base/rbac/role.yaml").read_text())
    assert render("deploy/cluster-prerequisites")[bound["kind"], bound["name"]]["rules"] == role["rules"]


def test_role_for_the_lease_suffices_to_take_and_to_leave_it(control_plane: ControlPlane, rest: Rest) -> None:
    lease = list(yaml.safe_load_all((ROOT / "deploy/base/operator/lease-role.yaml").read_text()))
    control_plane.kubectl("apply", "-f", "-", input=lease)
    with Meddler(control_plane, user=ACCOUNT) as meddler:
        flags = ("--namespaces=rbac", "--progress=Pod", "--leader-elect", "--lease-namespace=disttrain-system")
        for number in (1, 2):  # the first makes the Lease and leaves it, the second finds it free
            with Operator(
                control_plane, *flags, kubeconfig=meddler.kubeconfig, name=f"operator-lease-{number}"
            ) as operator:
                # A Lease that was not left would be free after 15 s.
                eventually(lambda: "disttrain_operator_leader 1.0" in operator.answer("/metrics")[1], seconds=10)
                assert operator.stop() == 0
                assert "cannot be" not in operator.log
        used = {right for right in meddler.allowed if right[1] == "leases"}
    assert used == granted(lease[0]["rules"])


def _gang_comes_and_goes(rest: Rest, gang: str, version: str) -> None:
    """With a name that is taken at first."""
    name, groups = gang.lower(), f"apis/{version}/{{}}/podgroups"
    body = {"apiVersion": version, "kind": "PodGroup", "metadata": {"name": name}, "spec": {"minMember": 1}}
    rest.create(groups, body)
    rest.create(JOBS, job(name, scheduling={"gang": gang}))
    eventually(lambda: "NameTaken" in str(rest.get(JOBS, name)["status"]["conditions"]))
    rest.delete(groups, name)
    eventually(lambda: rest.find(groups, name), seconds=30)
    if gang == "Volcano":  # without that phase it gets no pods; its PodGroup has no status subresource
        rest.merge(f"{groups}/{name}", {"status": {"phase": "Inqueue"}})
    eventually(lambda: sorted(rest.pods_of(name)) == pod_names(name))
    rest.merge(f"{JOBS}/{name}", {"spec": {"suspend": True}})
    eventually(lambda: rest.find(groups, name) is None)


def test_gang_scheduling_component_suffices_for_a_gang_and_nothing_of_it_is_idle(
    control_plane: ControlPlane, rest: Rest, tmp_path: Path
) -> None:
    kinds = {"Coscheduling": "scheduling.x-k8s.io/v1alpha1", "Volcano": "scheduling.volcano.sh/v1beta1"}
    crds = ROOT / "tests/apiserver/gangs"
    for base in ("deploy/base", "deploy/cluster-prerequisites"):
        kustomization = {
            "resources": [os.path.relpath(ROOT / base, tmp_path)],
            "components": [os.path.relpath(ROOT / "deploy/components/gang-scheduling", tmp_path)],
        }
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        text = control_plane.kubectl("kustomize", str(tmp_path))
        objects = {(body["kind"], body["metadata"]["name"]): body for body in yaml.safe_load_all(text)}
        role = objects["ClusterRole", "disttrain-operator"]
        (own,) = yaml.safe_load_all((ROOT / "deploy/base/rbac/role.yaml").read_text())
        assert role["rules"][:-1] == own["rules"]
    control_plane.kubectl("apply", "-f", str(crds))
    for version in kinds.values():
        eventually(lambda: rest("GET", f"apis/{version}/{{}}/podgroups")["kind"] == "PodGroupList")  # noqa: B023
    control_plane.kubectl("apply", "-f", "-", input=[role])
    flags = ("--namespaces=rbac", "--progress=Pod")
    with (
        Meddler(control_plane, user=ACCOUNT) as meddler,
        Operator(control_plane, *flags, kubeconfig=meddler.kubeconfig, name="operator-gang-rbac") as operator,
    ):
        for gang, version in kinds.items():
            _gang_comes_and_goes(rest, gang, version)
        assert "forbidden" not in operator.log
        needed = {right for right in granted(role["rules"]) if right[1] == "podgroups"}
        eventually(lambda: needed <= meddler.allowed)
        assert needed == {right for right in meddler.allowed if right[1] == "podgroups"}
    control_plane.kubectl("delete", "-f", str(crds))
    control_plane.kubectl("apply", "-k", str(ROOT / "deploy/base/rbac"))
