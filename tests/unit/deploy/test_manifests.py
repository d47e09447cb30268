"""What `kubectl apply -k` would apply: rendered by kubectl itself, held to the API's schemas and to our own rules."""

import functools
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from disttrain.api.names import CONTROL_PORT, METRICS_PORT
from disttrain.manifests.network_policy import build_network_policy
from unit.manifests.jobs import job
from unit.manifests.reach import admits

ROOT = Path(__file__).parents[3]
KUSTOMIZATIONS = sorted(
    str(path.parent.relative_to(ROOT))
    for path in (ROOT / "deploy").rglob("kustomization.yaml")
    if path.parent.parent.name in ("deploy", "overlays")
)
WITH_MONITORING = [name for name in KUSTOMIZATIONS if name.endswith(("overlays/monitoring", "overlays/kind"))]
PREREQUISITES = "deploy/cluster-prerequisites"
INSTALLATIONS = ["deploy/base", "deploy/overlays/namespaced"]
"""Those that name images of their own, which who installs them renames."""
VERSIONS = ["1.32", "1.34"]
OWN_IMAGES = ("disttrain/operator", "disttrain/trainer")

Object = dict[str, Any]


@functools.cache
def _render(name: str, root: Path) -> tuple[Object, ...]:
    done = subprocess.run(["kubectl", "kustomize", name], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kustomize warns"
    return tuple(yaml.safe_load_all(done.stdout))


def render(name: str, root: Path = ROOT) -> tuple[Object, ...]:
    if shutil.which("kubectl") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("kubectl is not installed")
    return _render(name, root)


def key(each: Object) -> str:
    return f"{each['kind']}/{each['metadata'].get('namespace', '')}/{each['metadata']['name']}"


def find(objects: tuple[Object, ...], kind: str, name: str = "") -> list[Object]:
    return [each for each in objects if each["kind"] == kind and each["metadata"]["name"].startswith(name)]


def pod_specs(objects: tuple[Object, ...]) -> list[tuple[str, Object]]:
    return [(key(each), each["spec"]["template"]["spec"]) for each in objects if "template" in each.get("spec", {})]


def containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def each_kustomization(names: list[str] = KUSTOMIZATIONS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


@each_kustomization()
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_fits_the_schema_of_kubernetes(name: str, version: str) -> None:
    for each in render(name):
        _check(json.dumps(each), version)


@functools.cache
def _check(text: str, version: str) -> None:
    """Most objects are in several overlays, and the schemas take a while to load."""
    kubernetes_validate.validate(json.loads(text), version, strict=True)


def test_a_misspelt_field_would_be_seen() -> None:
    (deployment,) = find(render("deploy/monitoring"), "Deployment", "grafana")
    with pytest.raises(kubernetes_validate.ValidationError, match="replicaz"):
        kubernetes_validate.validate(deployment | {"spec": deployment["spec"] | {"replicaz": 2}}, "1.34", strict=True)


@each_kustomization()
def test_no_object_is_there_twice_and_each_has_a_namespace_that_exists(name: str) -> None:
    objects = render(name)
    keys = [key(each) for each in objects]
    assert len(keys) == len(set(keys))
    namespaces = {each["metadata"]["name"] for each in find(objects, "Namespace")} or {"default"}
    assert {each["metadata"]["namespace"] for each in objects if "namespace" in each["metadata"]} <= namespaces
    for each in find(objects, "Namespace"):
        assert each["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@each_kustomization()
def test_every_pod_is_restricted(name: str) -> None:
    for where, spec in pod_specs(render(name)):
        pod = spec.get("securityContext", {})
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), where
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume], where
        for container in containers(spec):
            own = container["securityContext"]
            merged = pod | own
            assert merged["runAsNonRoot"] is True, where
            assert merged.get("runAsUser", 1) != 0, where
            assert merged["seccompProfile"] == {"type": "RuntimeDefault"}, where
            assert own["allowPrivilegeEscalation"] is False, where
            assert own["readOnlyRootFilesystem"] is True, where
            assert own["capabilities"] == {"drop": ["ALL"]}, where


@each_kustomization()
def test_every_container_has_resources_probes_and_a_pinned_image(name: str) -> None:
    for where, spec in pod_specs(render(name)):
        for container in containers(spec):
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), where
            assert "memory" in container["resources"]["limits"], where
            image, _, tag = container["image"].rpartition(":")
            assert image, f"{where}: {container['image']} has no tag"
            assert tag != "latest" or image in OWN_IMAGES, where
        for container in spec["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= container.keys(), where


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_the_operator_leaves_a_lost_node_after_30_seconds(name: str) -> None:
    (operator,) = find(render(name), "Deployment", "disttrain-operator")
    tolerated = {one["key"]: one for one in operator["spec"]["template"]["spec"]["tolerations"]}
    for taint in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        assert tolerated[taint] == {
            "key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30
        }  # fmt: skip


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_two_operators_on_two_nodes_wait_for_one_lease_and_a_drain_takes_one_of_them(name: str) -> None:
    objects = render(name)
    (operator,) = find(objects, "Deployment", "disttrain-operator")
    template = operator["spec"]["template"]
    assert operator["spec"]["replicas"] == 2
    (container,) = template["spec"]["containers"]
    settings = {variable["name"]: variable for variable in container["env"]}
    assert settings["DISTTRAIN_OPERATOR_LEADER_ELECT"]["value"] == "true"
    own = {"fieldRef": {"fieldPath": "metadata.namespace"}}
    assert settings["DISTTRAIN_OPERATOR_LEASE_NAMESPACE"]["valueFrom"] == own
    (apart,) = template["spec"]["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert apart["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
    (budget,) = find(objects, "PodDisruptionBudget", "disttrain-operator")
    assert budget["spec"]["minAvailable"] == 1
    for selector in (apart["podAffinityTerm"]["labelSelector"], budget["spec"]["selector"]):
        assert selector["matchLabels"].items() <= template["metadata"]["labels"].items()
    for each in (budget, *find(objects, "Role"), *find(objects, "RoleBinding")):
        assert each["metadata"]["namespace"] == operator["metadata"]["namespace"]


@each_kustomization(WITH_MONITORING)
def test_operator_and_prometheus_reach_the_metrics_of_a_job_and_no_other_port(name: str) -> None:
    objects = render(name)
    namespaces = {each["metadata"]["name"]: each["metadata"]["labels"] for each in find(objects, "Namespace")}
    policy = build_network_policy(job())
    for program in ("disttrain-operator", "prometheus"):
        (deployment,) = find(objects, "Deployment", program)
        namespace = deployment["metadata"]["namespace"]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        who = {"namespace": namespace, "namespace_labels": namespaces[namespace], "labels": labels}
        assert admits(policy, port=METRICS_PORT, **who)
        assert not admits(policy, port=CONTROL_PORT, **who)


@each_kustomization()
def test_roles_name_what_they_allow(name: str) -> None:
    for role in (each for each in render(name) if each["kind"] in ("Role", "ClusterRole")):
        for rule in role["rules"]:
            words = [
                *rule.get("apiGroups", []),
                *rule.get("resources", []),
                *rule["verbs"],
                *rule.get("nonResourceURLs", []),
            ]
            assert not [word for word in words if "*" in word], key(role)
            # A right over workloads of others, or to more rights, is the cluster.
            assert not {"escalate", "impersonate"} & set(rule["verbs"]), key(role)
            if "bind" in rule["verbs"]:
                assert name == PREREQUISITES
                assert (rule["resources"], rule["resourceNames"]) == (["clusterroles"], ["disttrain-operator"])
            assert not {"pods/exec", "pods/attach", "nodes/proxy", "serviceaccounts/token"} & set(
                rule.get("resources", [])
            ), key(role)
            # To list or watch Secrets is to read them all.
            assert "secrets" not in rule.get("resources", []) or {*rule["verbs"]} == {"create", "delete"}, key(role)


@each_kustomization()
def test_every_binding_leads_to_a_role_and_an_account_that_exist(name: str) -> None:
    objects = render(name)
    before = render(PREREQUISITES) if name.endswith("namespaced") else ()
    roles = {
        (each["kind"], each["metadata"]["name"])
        for each in (*before, *objects)
        if each["kind"] in ("Role", "ClusterRole")
    }
    accounts = {(each["metadata"]["namespace"], each["metadata"]["name"]) for each in find(objects, "ServiceAccount")}
    for binding in (each for each in objects if each["kind"] in ("RoleBinding", "ClusterRoleBinding")):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in roles, key(binding)
        for subject in binding["subjects"]:
            assert (subject["namespace"], subject["name"]) in accounts, key(binding)
    for where, spec in pod_specs(objects):
        assert (where.split("/")[1], spec["serviceAccountName"]) in accounts, where


@each_kustomization()
def test_every_config_map_service_port_and_selector_meets_its_counterpart(name: str) -> None:
    objects = render(name)
    maps = {(each["metadata"]["namespace"], each["metadata"]["name"]) for each in find(objects, "ConfigMap")}
    for where, spec in pod_specs(objects):
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                assert (where.split("/")[1], volume["configMap"]["name"]) in maps, where
        mounted = {mount["name"] for container in containers(spec) for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in spec.get("volumes", [])}, where
    for service in find(objects, "Service"):
        selected = [
            each
            for each in objects
            if "template" in each.get("spec", {})
            and each["metadata"].get("namespace") == service["metadata"]["namespace"]
            and service["spec"]["selector"].items() <= each["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert len(selected) == 1, key(service)
        ports = {
            port["name"]
            for container in selected[0]["spec"]["template"]["spec"]["containers"]
            for port in container["ports"]
        }
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports, key(service)


def test_people_with_view_see_jobs_and_people_with_edit_change_all_but_the_status() -> None:
    roles = {each["metadata"]["name"]: each for each in find(render("deploy/base"), "ClusterRole", "disttrainjob-")}
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    view, edit = roles["disttrainjob-view"], roles["disttrainjob-edit"]
    assert {prefix + "view", prefix + "edit", prefix + "admin"} <= view["metadata"]["labels"].keys()
    assert {prefix + "edit", prefix + "admin"} <= edit["metadata"]["labels"].keys()
    assert prefix + "view" not in edit["metadata"]["labels"]
    assert {verb for rule in view["rules"] for verb in rule["verbs"]} == {"get", "list", "watch"}
    assert "disttrainjobs/status" not in [resource for rule in edit["rules"] for resource in rule["resources"]]


def test_the_overlay_for_a_namespace_and_its_prerequisites_are_the_base_for_a_cluster_in_two_halves() -> None:
    base = {(each["kind"], each["metadata"]["name"]): each for each in render("deploy/base")}
    before = {(each["kind"], each["metadata"]["name"]): each for each in render(PREREQUISITES)}
    within = {(each["kind"], each["metadata"]["name"]) for each in render("deploy/overlays/namespaced")}
    kinds = {kind for kind, _ in within}
    assert kinds == {"ServiceAccount", "Role", "RoleBinding", "Deployment", "PodDisruptionBudget"}, (
        "no cluster-wide right"
    )
    of_cluster = {("Namespace", "disttrain-system"), ("ClusterRoleBinding", "disttrain-operator")}
    of_namespace = {("ClusterRole", "disttrain-operator-bind"), ("RoleBinding", "disttrain-operator")}
    assert before.keys() | within == base.keys() - of_cluster | of_namespace
    assert not before.keys() & within
    assert {name: before[name] for name in before.keys() & base.keys()} == {
        name: base[name] for name in before.keys() & base.keys()
    }


def images(objects: tuple[Object, ...]) -> list[str]:
    """Those of the operator's Deployment: its own, and that of the trainer, which it gets in a variable."""
    (operator,) = find(objects, "Deployment", "disttrain-operator")
    (container,) = operator["spec"]["template"]["spec"]["containers"]
    settings = {variable["name"]: variable.get("value") for variable in container["env"]}
    return [container["image"], settings["DISTTRAIN_OPERATOR_TRAINER_IMAGE"]]


@each_kustomization(INSTALLATIONS)
def test_an_installation_carries_the_version_of_the_package(name: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert images(render(name)) == [f"disttrain/operator:{version}", f"disttrain/trainer:{version}"]


@each_kustomization(INSTALLATIONS)
def test_images_are_renamed_in_one_place(name: str, tmp_path: Path) -> None:
    """As README says: under `images:` of the one file, and nowhere else."""
    for folder in ("crds", "deploy"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    file = tmp_path / name / "kustomization.yaml"
    kustomization = yaml.safe_load(file.read_text())
    for image in kustomization["images"]:
        image |= {"newName": image["name"].replace("disttrain", "registry.example/ours"), "newTag": "7"}
    file.write_text(yaml.safe_dump(kustomization))
    assert images(render(name, tmp_path)) == ["registry.example/ours/operator:7", "registry.example/ours/trainer:7"]


def test_kind_runs_the_images_that_the_script_loads_and_asks_no_registry() -> None:
    script = (ROOT / "deploy" / "kind" / "up.sh").read_text()
    tag = re.search(r"^readonly TAG=(\w+)$", script, re.MULTILINE)
    assert tag is not None
    objects = render("deploy/overlays/kind")
    assert images(objects) == [f"disttrain/operator:{tag[1]}", f"disttrain/trainer:{tag[1]}"]
    (operator,) = find(objects, "Deployment", "disttrain-operator")
    (container,) = operator["spec"]["template"]["spec"]["containers"]
    assert container["imagePullPolicy"] == "IfNotPresent"


def test_kind_maps_grafanas_node_port_to_loopback() -> None:
    cluster = yaml.safe_load((ROOT / "deploy" / "kind" / "cluster.yaml").read_text())
    (mapping,) = cluster["nodes"][0]["extraPortMappings"]
    (service,) = find(render("deploy/overlays/kind"), "Service", "grafana")
    assert service["spec"]["type"] == "NodePort"
    assert service["spec"]["ports"][0]["nodePort"] == mapping["containerPort"]
    assert mapping["listenAddress"] == "127.0.0.1"


def test_prometheus_is_the_one_that_the_tests_run() -> None:
    (server,) = find(render("deploy/monitoring"), "Deployment", "prometheus")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    module = (ROOT / "tests/cluster/kube/prometheus/go.mod").read_text()
    (minor, patch) = re.search(
        r"^require github\.com/prometheus/prometheus v0\.3(\d\d)\.(\d+)$", module, re.MULTILINE
    ).groups()
    assert container["image"] == f"prom/prometheus:v3.{int(minor)}.{patch}"


@each_kustomization(WITH_MONITORING)
def test_prometheus_may_find_pods_and_nothing_else(name: str) -> None:
    (role,) = find(render(name), "ClusterRole", "disttrain-prometheus")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]


@each_kustomization(WITH_MONITORING)
def test_prometheus_finds_the_operator(name: str) -> None:
    """By namespace, label and port name."""
    objects = render(name)
    (config,) = find(objects, "ConfigMap", "prometheus")
    scrape = next(
        each
        for each in yaml.safe_load(config["data"]["prometheus.yml"])["scrape_configs"]
        if each["job_name"] == "disttrain-operator"
    )
    (discovery,) = scrape["kubernetes_sd_configs"]
    (operator,) = find(objects, "Deployment", "disttrain-operator")
    label, _, value = discovery["selectors"][0]["label"].partition("=")
    template = operator["spec"]["template"]
    assert discovery["namespaces"]["names"] == [operator["metadata"]["namespace"]]
    assert template["metadata"]["labels"][label] == value
    names = [port["name"] for container in template["spec"]["containers"] for port in container["ports"]]
    assert len([each for each in names if re.fullmatch("metrics|http", each)]) == 1


@each_kustomization(WITH_MONITORING)
def test_grafana_is_given_its_data_source_and_both_dashboards_and_no_password(name: str) -> None:
    objects = render(name)
    (dashboards,) = find(objects, "ConfigMap", "grafana-dashboards")
    assert dashboards["data"].keys() == {"job.json", "operator.json"}
    # kubectl apply keeps a copy in an annotation, of which all together may have 262144 bytes
    assert sum(map(len, dashboards["data"].values())) < 180_000
    (datasources,) = find(objects, "ConfigMap", "grafana-datasources")
    (datasource,) = yaml.safe_load(datasources["data"]["datasources.yml"])["datasources"]
    (service,) = find(objects, "Service", "prometheus")
    assert datasource["url"] == f"http://prometheus:{service['spec']['ports'][0]['port']}"
    (config,) = find(objects, "ConfigMap", "prometheus")
    assert (
        datasource["jsonData"]["timeInterval"]
        == yaml.safe_load(config["data"]["prometheus.yml"])["global"]["scrape_interval"]
    )
    (grafana,) = find(objects, "Deployment", "grafana")
    (container,) = grafana["spec"]["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert not [each for each in environment if "PASSWORD" in each]
    (providers,) = find(objects, "ConfigMap", "grafana-dashboard-providers")
    (provider,) = yaml.safe_load(providers["data"]["providers.yml"])["providers"]
    assert provider["options"]["path"] in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{provider['options']['path']}/operator.json"


def test_the_copies_of_what_names_the_trainers_image_are_equal() -> None:
    """Kustomize reads no file above its root, so each overlay of its own images has one."""
    copies = [*(ROOT / "deploy").rglob("images.yaml"), *(ROOT / "tests").rglob("images.yaml")]
    assert len(copies) == 4
    assert len({path.read_text() for path in copies}) == 1
