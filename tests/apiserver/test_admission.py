"""deploy/components/admission on a real API server: who writes a job gets what they could have in a pod of their own, and no more."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from apiserver.operating import JOBS, Refusal, Rest, eventually, job
from cluster.controlplane import ControlPlane
from disttrain.api.template import Container, PodSpec

NAMESPACE = "authors"
ROOT = Path(__file__).resolve().parents[2]
COMPONENT = ROOT / "deploy/components/admission"
OPERATOR = "system:serviceaccount:disttrain-system:disttrain-operator"
LOOP = job("any")["spec"]["trainer"]
PACKED = LOOP | {"dataset": "disttrain_trainer.data:packed"}
CLAIM = {"volume": {"persistentVolumeClaim": "weights"}}


def pod(**spec: Any) -> dict[str, Any]:
    return {"worker": {"replicas": 1, "template": {"spec": spec}}}


def container(**more: Any) -> dict[str, Any]:
    return pod(containers=[{"name": "trainer", **more}])


NEED_PODS = {
    "checkpoint": ({"checkpoint": CLAIM}, "spec.checkpoint.volume"),
    "data": ({"data": {"volume": {"persistentVolumeClaim": "images", "path": "/images"}}}, "spec.data.volume"),
    "url-secret": ({"trainer": PACKED, "data": {"url": "s3://b/p", "urlSecretName": "key"}}, "spec.data.urlSecretName"),
    "encryption": (
        {"trainer": PACKED, "data": {"url": "s3://b/p", "encryption": {"secretName": "key"}}},
        "spec.data.encryption",
    ),
    "code": ({"trainer": LOOP | {"code": {"configMap": "mine"}}}, "spec.trainer.code"),
    "secret": (
        pod(volumes=[{"name": "t", "secret": {"secretName": "somebodys-token"}}]),
        "worker.template.spec.volumes, t",
    ),
    "variable": (
        container(env=[{"name": "T", "valueFrom": {"secretKeyRef": {"name": "somebodys-token", "key": "t"}}}]),
        "worker.template.spec.containers, trainer",
    ),
    "env-from": (container(envFrom=[{"secretRef": {"name": "somebodys-token"}}]), "containers, trainer"),
    "init": (
        pod(initContainers=[{"name": "i", "image": "i:1", "envFrom": [{"secretRef": {"name": "t"}}]}]),
        "containers, i",
    ),
    "pull-secret": (pod(imagePullSecrets=[{"name": "t"}]), "worker.template.spec.imagePullSecrets"),
    "claim": (
        {"master": {"template": {"spec": {"resourceClaims": [{"name": "gpu", "resourceClaimName": "theirs"}]}}}},
        "master.template.spec.resourceClaims",
    ),
    "tolerations": (
        {"parameterServer": {"replicas": 1, "template": {"spec": {"tolerations": [{"operator": "Exists"}]}}}},
        "parameterServer.template.spec.tolerations",
    ),
    "injected": (
        {"worker": {"replicas": 1, "template": {"metadata": {"annotations": {"inject.example.org": "key"}}}}},
        "worker.template.metadata",
    ),
}
NEED_USE = {
    "account": (pod(serviceAccountName="cluster-admin-bot"), "the service account cluster-admin-bot"),
    "old-account": (pod(serviceAccountName="", serviceAccount="bot"), "the service account bot"),
    "class": (pod(priorityClassName="system-node-critical"), "the priority class system-node-critical"),
    "job-class": ({"scheduling": {"priorityClassName": "high"}}, "the priority class high"),
    "runtime": (
        {"master": {"template": {"spec": {"runtimeClassName": "host"}}}},
        "the runtime class host",
    ),
    "server": (
        {"parameterServer": {"replicas": 1, "template": {"spec": {"serviceAccountName": "bot"}}}},
        "the service account bot",
    ),
}
PLAIN = {
    "plain": {},
    "sized": container(resources={"limits": {"memory": "1Gi"}}, env=[{"name": "A", "value": "b"}]),
    "scratch": pod(
        volumes=[{"name": "s", "emptyDir": {}}], nodeSelector={"gpu": "h100"}, securityContext={"runAsUser": 1000}
    ),
    "default-account": {"worker": {"replicas": 1, "template": {"spec": {}}}},
}


def role(name: str, rules: list[dict[str, Any]], user: str, kind: str = "Role") -> list[Any]:
    where = {"namespace": NAMESPACE} if kind == "Role" else {}
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    return [
        {**rbac, "kind": kind, "metadata": {"name": name, **where}, "rules": rules},
        {
            **rbac,
            "kind": f"{kind}Binding",
            "metadata": {"name": name, **where},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
            "subjects": [{"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"}],
        },
    ]


MAY_WRITE_JOBS = {"apiGroups": ["disttrain.dev"], "resources": ["disttrainjobs"], "verbs": ["create", "get", "patch"]}
MAY_CREATE_PODS = {"apiGroups": [""], "resources": ["pods"], "verbs": ["create"]}
MAY_USE_ACCOUNTS = {
    "apiGroups": [""],
    "resources": ["serviceaccounts"],
    "resourceNames": ["bot", "cluster-admin-bot"],
    "verbs": ["use"],
}
MAY_USE_CLASSES = [
    {
        "apiGroups": ["scheduling.k8s.io"],
        "resources": ["priorityclasses"],
        "resourceNames": ["system-node-critical", "high"],
        "verbs": ["use"],
    },
    {"apiGroups": ["node.k8s.io"], "resources": ["runtimeclasses"], "resourceNames": ["host"], "verbs": ["use"]},
]


class Users(NamedTuple):
    """alice may write jobs, carol creates pods too, bob may besides use what the jobs name."""

    alice: Rest
    carol: Rest
    bob: Rest
    operator: Rest


@pytest.fixture(scope="module")
def users(control_plane: ControlPlane, rest: Rest) -> Iterator[Users]:
    """Under the policies of the component."""
    roles = role("alice", [MAY_WRITE_JOBS], "alice") + role("carol", [MAY_WRITE_JOBS, MAY_CREATE_PODS], "carol")
    roles += role("bob", [MAY_WRITE_JOBS, MAY_CREATE_PODS, MAY_USE_ACCOUNTS], "bob")
    roles += role("disttrain-test-bob", MAY_USE_CLASSES, "bob", "ClusterRole")
    roles += role("operator", [MAY_WRITE_JOBS], OPERATOR)
    control_plane.kubectl("create", "-f", "-", input=roles)
    rest.create(JOBS, job("first"))
    users = Users(*(Rest(control_plane, NAMESPACE, user=name) for name in ("alice", "carol", "bob", OPERATOR)))
    rendered = control_plane.kubectl("kustomize", str(COMPONENT))
    control_plane.kubectl("apply", "-f", "-", input=rendered)
    try:
        eventually(lambda: refused(users.alice, {"account": NEED_USE["account"][0]}))
        eventually(lambda: patched(users.operator, "first", metadata={"labels": {"a": "b"}}))
        yield users
    finally:
        control_plane.kubectl("delete", "-f", "-", input=rendered)
        control_plane.kubectl("delete", "clusterrole,clusterrolebinding", "disttrain-test-bob")


def refused(user: Rest, specs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the API server says to a user who creates jobs of these specs, by their names; nothing for one that it would take."""
    found = {name: said(lambda: user("POST", f"{JOBS}?dryRun=All", job(name, **spec))) for name, spec in specs.items()}  # noqa: B023
    return {name: text for name, text in found.items() if text}


def patched(user: Rest, name: str, **patch: Any) -> str:
    """What it says to one who changes a job; "" where it would take the change."""
    return said(lambda: user.merge(f"{JOBS}/{name}?dryRun=All", patch))


def said(request: Callable[[], Any]) -> str:
    try:
        request()
    except Refusal as refusal:
        if refusal.status != 403:
            raise
        return str(json.loads(refusal.body)["message"])
    return ""


def specs(table: dict[str, tuple[dict[str, Any], str]]) -> dict[str, dict[str, Any]]:
    return {name: spec for name, (spec, _) in table.items()}


def test_who_may_create_jobs_alone_gets_nothing_that_their_own_pod_could_not_have(users: Users) -> None:
    assert refused(users.alice, PLAIN) == {}
    told = refused(users.alice, specs(NEED_PODS | NEED_USE))
    assert told.keys() == NEED_PODS.keys() | NEED_USE.keys()
    for name, (_, words) in NEED_PODS.items():
        assert words in told[name]
        assert "which alice may not" in told[name]


def test_who_may_create_pods_still_has_to_have_the_use_of_accounts_and_classes(users: Users) -> None:
    assert refused(users.carol, specs(NEED_PODS)) == {}
    told = refused(users.carol, specs(NEED_USE))
    assert told.keys() == NEED_USE.keys()
    for name, (_, words) in NEED_USE.items():
        assert f"{words} needs the right to use it, which carol does not have" in told[name]
    assert refused(users.bob, specs(NEED_PODS | NEED_USE)) == {}


def test_a_change_asks_of_who_makes_it_unless_what_runs_stays_as_it_is(users: Users, rest: Rest) -> None:
    rest.create(JOBS, job("shared", checkpoint=CLAIM, suspend=True))
    assert patched(users.alice, "shared", metadata={"labels": {"a": "b"}}) == ""
    assert patched(users.alice, "shared", spec={"suspend": False}) == ""
    assert "spec.checkpoint.volume" in patched(users.alice, "shared", spec={"runPolicy": {"backoffLimit": 1}})
    assert patched(users.carol, "shared", spec={"runPolicy": {"backoffLimit": 1}}) == ""


def test_the_operator_suspends_a_job_and_changes_nothing_else(users: Users, rest: Rest) -> None:
    operator = users.operator
    rest.create(JOBS, job("held", suspend=True))
    assert patched(operator, "first", spec={"suspend": True}) == ""
    policy = {"runPolicy": {"backoffLimit": 1}}
    assert "nothing of a job's spec" in patched(operator, "first", spec=policy)
    assert "nothing of a job's spec" in patched(operator, "first", spec={"suspend": True, **policy})
    assert "resumes none" in patched(operator, "held", spec={"suspend": False})
    for metadata in ({"annotations": {"a": "b"}}, {"labels": {"a": "b"}}, {"finalizers": ["example.org/a"]}):
        assert "no metadata" in patched(operator, "first", metadata=metadata)
    assert "creates no jobs" in refused(operator, {"made": {}})["made"]


def test_what_everybody_may_say_of_a_pod_is_typed() -> None:
    """A field that the operator does not know may be any way around a right."""
    (policy, _) = yaml.safe_load_all((COMPONENT / "author.yaml").read_text())
    variables = {each["name"]: each["expression"] for each in policy["spec"]["variables"]}
    for name, model in (("fields", PodSpec), ("containerFields", Container)):
        listed = set(re.findall(r"'(\w+)'", variables[name]))
        assert listed <= {field.alias or key for key, field in model.model_fields.items()}


def test_every_object_that_a_spec_names_counts() -> None:
    """Outside of the templates, of which only what is listed is free."""
    crd = yaml.safe_load((ROOT / "crds/disttrainjobs.yaml").read_text())
    (version,) = crd["spec"]["versions"]
    text = (COMPONENT / "author.yaml").read_text()
    for path in naming(version["schema"]["openAPIV3Schema"]["properties"]["spec"], ()):
        parts = [path[:length] for length in range(1, len(path) + 1)]
        assert any(f"'{'.'.join(part)}'" in text or f"spec.{'.'.join(part)}:" in text for part in parts), path


def naming(schema: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The fields whose names say that they name an object of the cluster."""
    for name, field in schema.get("properties", {}).items():
        if (
            re.search(r"secret|claim|configmap|className|account", name, re.IGNORECASE)
            and field.get("type") == "string"
        ):
            yield *path, name
        if name != "template":
            yield from naming(field, (*path, name))
