"""The CRD itself, on a real API server: accepted, explained field by field, defaulted as in Python, and nothing valid is pruned."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver.corpus import bad, good, transitions
from cluster.controlplane import ControlPlane
from disttrain.api import crd
from disttrain.api.names import API_VERSION, KIND
from disttrain.api.status import DistTrainJobStatus

FILE = Path("crds/disttrainjobs.yaml")
Schema = dict[str, Any]


def root() -> Schema:
    schema: Schema = crd.crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every node of a schema with its path; [0] stands for an entry of a list."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}".removeprefix("."))
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[0]")
    if "additionalProperties" in schema:
        yield from nodes(schema["additionalProperties"], f"{path}.KEY")


def job(name: str, **spec: Any) -> dict[str, Any]:
    trainer = {"command": ["python", "-m", "mine"]}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"strategy": {"type": "DataParallel"}, "trainer": trainer} | spec,
    }


def test_the_file_is_up_to_date() -> None:
    assert FILE.read_text() == crd.render(), "run `python -m disttrain.api.crd > crds/disttrainjobs.yaml`"


def test_a_stale_file_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "crd.yaml"
    stale.write_text(crd.render().replace("maximum: 10000", "maximum: 9999"))
    assert crd.main(["--check", str(stale)]) == 1
    assert "is stale: run" in capsys.readouterr().err
    assert crd.main(["--check", str(FILE)]) == 0


def test_it_is_small_enough_for_a_plain_apply() -> None:
    # The annotation of a plain apply holds at most 256 KiB.
    assert FILE.stat().st_size < 200_000


def test_a_plain_apply_takes_it(control_plane: ControlPlane) -> None:
    # Client-side apply keeps the whole object in an annotation of at most 256 KiB; --dry-run leaves the installed one alone.
    control_plane.kubectl("create", "--dry-run=server", "--save-config", "-f", "-", input=_renamed())
    conditions = control_plane.get("crd", "disttrainjobs.disttrain.dev")["status"]["conditions"]
    states = {condition["type"]: condition["status"] for condition in conditions}
    assert states["Established"] == "True"
    assert states.get("NonStructuralSchema", "False") == "False"


def _renamed() -> dict[str, Any]:
    body = crd.crd()
    body["metadata"]["name"] = "othertrainjobs.disttrain.dev"
    names = body["spec"]["names"]
    names |= {
        "kind": "OtherTrainJob",
        "listKind": "OtherTrainJobList",
        "plural": "othertrainjobs",
        "singular": "othertrainjob",
    }
    names["shortNames"] = ["otj"]
    return body


def served(control_plane: ControlPlane) -> dict[str, Schema]:
    """The schema as the API server gives it back: stored, and published for kubectl explain and for clients."""
    stored = control_plane.get("crd", "disttrainjobs.disttrain.dev")
    document = json.loads(control_plane.kubectl("get", "--raw", "/openapi/v3/apis/disttrain.dev/v1alpha1"))
    (published,) = (
        schema
        for schema in document["components"]["schemas"].values()
        if {"kind": KIND} in ({"kind": entry["kind"]} for entry in schema.get("x-kubernetes-group-version-kind", ()))
    )
    # What every object has is the API server's own.
    published["properties"]["metadata"] = {"type": "object", "description": "ObjectMeta"}
    return {"stored": stored["spec"]["versions"][0]["schema"]["openAPIV3Schema"], "published": published}


@pytest.mark.parametrize("whose", ["stored", "published"])
def test_every_field_is_served_with_a_description(control_plane: ControlPlane, whose: str) -> None:
    schema = served(control_plane)[whose]
    silent = [
        path
        for path, node in nodes(schema)
        for name, child in node.get("properties", {}).items()
        if not child.get("description") and f"{path}.{name}" not in (".metadata", ".metadata.name", "metadata.name")
    ]
    assert silent == []
    # And nothing was lost on the way: every field of the models is there.
    assert {path for path, _ in nodes(root()["properties"]["spec"])} <= {
        path for path, _ in nodes(schema["properties"]["spec"])
    }


@pytest.mark.parametrize("whose", ["stored", "published"])
def test_every_default_is_in_the_description(control_plane: ControlPlane, whose: str) -> None:
    silent = [
        path
        for path, node in nodes(served(control_plane)[whose])
        if not isinstance(node.get("default", {}), dict) and "Default" not in node["description"]
    ]
    assert silent == []


def test_every_default_arrives(control_plane: ControlPlane) -> None:
    """For each there is a good input that has the object around it and leaves it out; the API server fills it in."""
    inputs = [yaml.safe_load(file.read_text())["spec"] for file in good()]
    stored = [
        json.loads(control_plane.kubectl("create", "--dry-run=server", "-o", "json", "-f", str(file)))["spec"]
        for file in good()
    ]
    defaults = {path: node["default"] for path, node in nodes(root()["properties"]["spec"]) if "default" in node}
    assert len(defaults) > 40
    lost = {
        path: default
        for path, default in defaults.items()
        if not any(
            _at(given, path) is ABSENT and _at(arrived, path) == default
            for given, arrived in zip(inputs, stored, strict=True)
            if isinstance(_at(given, path.rpartition(".")[0]), dict)
        )
    }
    assert lost == {}


ABSENT = object()


def _at(value: Any, path: str) -> Any:
    """The value at a path of `nodes`, ABSENT where there is none."""
    for part in path.replace("[0]", ".0").split(".") if path else ():
        if isinstance(value, list):
            value = value[int(part)] if value else ABSENT
        else:
            value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
    return value


def test_explain_is_the_manual(control_plane: ControlPlane) -> None:
    control_plane.kubectl("api-resources")  # which asks again: explain takes what kubectl cached before the CRD came
    text = control_plane.kubectl("explain", "dtj.spec.strategy.parameterServer")
    assert "enum: Sync, Async, BoundedStaleness" in text
    assert "Steps that a worker may be ahead of the slowest one" in text
    text = control_plane.kubectl("explain", "dtj.status.training.lastCheckpoint")
    assert "step" in text


def rules(schema: Schema) -> list[tuple[str, Schema, Schema]]:
    """Each rule: the path that it blames, the rule, and the schema of what it blames."""
    found = []
    for path, node in nodes(schema):
        for rule in node.get("x-kubernetes-validations", []):
            blamed = node
            for part in rule.get("fieldPath", "").split(".")[1:]:
                blamed = blamed["properties"][part]
            found.append(((path + rule.get("fieldPath", "")).removeprefix("."), rule, blamed))
    return found


def test_every_rule_has_an_input_that_breaks_it() -> None:
    """The inputs are tried in test_crd_inputs.py, and in the other roles in test_crd_templates.py; here: no rule is left out there.
    The one about strings in the place of numbers is for stored jobs only: test_stored_strings.py."""
    wants = [pattern for case in [*bad(), *transitions()] for pattern in case.expected]
    roles = re.compile(r"^spec\.(master|parameterServer)\.template\.")
    untried = [
        (path, rule["message"])
        for path, rule, _ in rules(root())
        if rule["rule"] != "self in [self]"
        and not any(_speaks_of(want, roles.sub("spec.worker.template.", path), rule["message"]) for want in wants)
    ]
    assert untried == []


def _speaks_of(want: str, path: str, message: str) -> bool:
    """A want about a rule is the path, words of the message, and the value where the rule is about one."""
    where, *words = want.split(".*")
    return bool(words) and bool(re.fullmatch(where.removesuffix(": "), path)) and bool(re.search(words[0], message))


def test_every_rule_about_one_value_tells_it() -> None:
    silent = [
        path
        for path, rule, blamed in rules(root())
        if blamed["type"] not in ("object", "array") and "messageExpression" not in rule
    ]
    assert silent == []


def test_columns_and_names(control_plane: ControlPlane) -> None:
    control_plane.kubectl("create", "-f", "-", input=job("columns", worker={"replicas": 3}))
    status = {
        "state": "Training",
        "worker": {"readyReplicas": 3, "selector": "a=b"},
        "restarts": {"total": 2},
        "training": {"step": 1250, "progressPercent": 27, "loss": 0.1834, "samplesPerSecond": 5120.4, "etaSeconds": 41},
    }
    _write_status(control_plane, "columns", status)
    header, row = control_plane.kubectl("get", "dtj", "columns", "-n", "default").splitlines()
    assert " ".join(header.split()) == "NAME STATE STRATEGY WORKERS STEP PROGRESS LOSS SAMPLES/S RESTARTS ETA AGE"
    assert " ".join(row.split()[:-1]) == "columns Training DataParallel 3 1250 27 0.1834 5120.4 2 41"
    assert "disttrainjob.disttrain.dev/columns" in control_plane.kubectl(
        "get", "training,all", "-n", "default", "-o", "name"
    )


def test_scale_reaches_the_workers_within_elastic_only(control_plane: ControlPlane) -> None:
    control_plane.kubectl("create", "-f", "-", input=job("fixed", worker={"replicas": 2}))
    control_plane.kubectl(
        "create",
        "-f",
        "-",
        input=job(
            "elastic",
            trainer={"script": {"file": "train.py"}},
            worker={"replicas": 2, "elastic": {"minReplicas": 1, "maxReplicas": 4}},
        ),
    )
    control_plane.kubectl("scale", "dtj/elastic", "--replicas=3", "-n", "default")
    assert control_plane.get("disttrainjob", "elastic", namespace="default")["spec"]["worker"]["replicas"] == 3
    with pytest.raises(RuntimeError, match="changes only within elastic"):
        control_plane.kubectl("scale", "dtj/fixed", "--replicas=3", "-n", "default")


def test_a_diff_after_apply_is_empty(control_plane: ControlPlane, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job("diff", runPolicy={"backoffLimit": 2})))
    control_plane.kubectl("apply", "-f", str(file))
    assert control_plane.kubectl("diff", "-f", str(file)) == ""


def test_a_full_status_is_stored_unpruned(control_plane: ControlPlane) -> None:
    control_plane.kubectl("create", "-f", "-", input=job("full-status"))
    status = _sample(root()["properties"]["status"])
    assert _write_status(control_plane, "full-status", status) == status
    assert DistTrainJobStatus.model_validate(status).to_dict() == status


def _write_status(control_plane: ControlPlane, name: str, status: dict[str, Any]) -> Any:
    body = control_plane.get("disttrainjob", name, namespace="default") | {"status": status}
    control_plane.kubectl("replace", "--subresource=status", "-f", "-", input=body)
    return control_plane.get("disttrainjob", name, namespace="default")["status"]


def _sample(schema: Schema) -> Any:
    """A value with every field of a schema set."""
    if "enum" in schema:
        return schema["enum"][0]
    match schema["type"]:
        case "object" if "properties" in schema:
            return {name: _sample(child) for name, child in schema["properties"].items()}
        case "object":
            return {"accuracy": _sample(schema["additionalProperties"])}
        case "array":
            return [_sample(schema["items"])]
        case "integer":
            return schema.get("minimum", 0) + 1
        case "number":
            return 0.5
        case "boolean":
            return True
        case _:
            texts = (
                ("2026-01-02T03:04:05Z",)
                if schema.get("format") == "date-time"
                else ("0.5", "0-2,5", 16 * "0", 64 * "0")
            )
            return next(text for text in texts if re.search(schema.get("pattern", ""), text))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_not_typed_is_kept(control_plane: ControlPlane, seed: int) -> None:
    """The user's own objects come back as they are: config, and all of a pod template that DistTrain does not type."""
    chance = random.Random(seed)
    pod_spec = {f"x{n}": _anything(chance) for n in range(4)}
    container = {f"y{n}": _anything(chance) for n in range(4)} | {
        "name": "trainer",
        "env": [{"name": "A", "valueFrom": {"z": {"zz": _anything(chance)}}}],
    }
    body = job(
        f"kept-{seed}",
        trainer={"command": ["x"], "config": {f"c{n}": _anything(chance) for n in range(4)}},
        worker={"template": {"spec": pod_spec | {"containers": [container]}}},
    )
    control_plane.kubectl("create", "-f", "-", input=body)
    stored = control_plane.get("disttrainjob", f"kept-{seed}", namespace="default")["spec"]
    assert stored["trainer"]["config"] == body["spec"]["trainer"]["config"]
    assert stored["worker"]["template"] == body["spec"]["worker"]["template"]


def _anything(chance: random.Random, depth: int = 3) -> Any:
    leaf = chance.choice([True, -7, 0.25, 2**40, "", "text", "ünï", [], {}])
    match chance.randrange(3) if depth else 0:
        case 1:
            return [_anything(chance, depth - 1) for _ in range(chance.randrange(3))]
        case 2:
            return {f"k{n}": _anything(chance, depth - 1) for n in range(chance.randrange(3))}
        case _:
            return json.loads(json.dumps(leaf))
