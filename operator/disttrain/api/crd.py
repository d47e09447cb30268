"""The CustomResourceDefinition, made from the pydantic models: `python -m disttrain.api.crd > crds/disttrainjobs.yaml`.

Kubernetes takes a *structural* schema: no $ref, no null, no free anyOf. What pydantic says is rewritten into one here, with the
CEL rules of `RULES`, so that the API server refuses wrong input by itself. Not here: what a field means (spec.py, status.py).
"""

import sys
from pathlib import Path
from typing import Any, Final, TypeAlias

from disttrain.api.job import DistTrainJob
from disttrain.api.names import GROUP, KIND, PLURAL, SHORT_NAME, SINGULAR, VERSION
from disttrain.api.types import INT32_MAX

Schema: TypeAlias = dict[str, Any]

HEADER: Final = "# Generated from operator/disttrain/api by `python -m disttrain.api.crd`; do not edit.\n"

_DROPPED: Final = frozenset(
    {
        "$ref",
        "$defs",
        "title",
        "default",
        "anyOf",
        "const",
        "additionalProperties",
        "properties",
        "items",
        "propertyNames",
    }
)
"""Keywords that `_structural` rewrites or that a structural schema lacks (propertyNames); every other one is copied."""

_OBJECT_META: Final[Schema] = {
    "apiVersion": {"type": "string", "description": f"API group and version: {GROUP}/{VERSION}."},
    "kind": {"type": "string", "description": f"Kind of the object: {KIND}."},
    "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
}
"""What the API server knows itself about every object; a CRD may not say more."""

COLUMNS: Final[tuple[tuple[str, str, str, int, str], ...]] = (
    ("STATE", "string", ".status.state", 0, "What the job does, in one word."),
    ("STRATEGY", "string", ".spec.strategy.type", 0, "How the training is distributed."),
    ("WORKERS", "integer", ".status.worker.readyReplicas", 0, "Workers that are ready."),
    ("STEP", "integer", ".status.training.step", 0, "Global steps done."),
    ("PROGRESS", "integer", ".status.training.progressPercent", 0, "Steps done, in percent."),
    ("LOSS", "number", ".status.training.loss", 0, "Mean loss of the last steps."),
    ("SAMPLES/S", "number", ".status.training.samplesPerSecond", 0, "Throughput of all workers together."),
    (
        "RESTARTS",
        "integer",
        ".status.restarts.total",
        0,
        "Failures that were answered with a restart, of a pod or in it.",
    ),
    ("ETA", "integer", ".status.training.etaSeconds", 0, "Seconds to the end."),
    ("AGE", "date", ".metadata.creationTimestamp", 0, "Since the job was created."),
    ("DESIRED", "integer", ".spec.worker.replicas", 1, "Workers that the job is to have."),
    ("ATTEMPT", "integer", ".status.attempt", 1, "Executions of the job."),
    ("CHECKPOINT", "integer", ".status.training.lastCheckpoint.step", 1, "Step of the newest checkpoint."),
    ("LAST-FAILURE", "string", ".status.restarts.last.reason", 1, "Why a pod was last replaced."),
    ("IMAGE", "string", ".spec.image", 1, "Image of the training containers."),
)
"""Of `kubectl get dtj`: name, type, where the value is, priority, description. Those of priority 0 are shown without -o wide."""


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition as a plain object."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT_NAME],
                "categories": ["all", "training"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root()},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.worker.replicas",
                            "statusReplicasPath": ".status.worker.readyReplicas",
                            "labelSelectorPath": ".status.worker.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        {"name": name, "type": type_, "jsonPath": path, "description": text}
                        | ({"priority": priority} if priority else {})
                        for name, type_, path, priority, text in COLUMNS
                    ],
                }
            ],
        },
    }


LINE_WIDTH = 200
"""Characters of a line of the file: with shorter ones a tenth of it is indentation."""


def render() -> str:
    """The CRD as YAML."""
    import yaml  # of the developers' tools: the API itself needs none

    return HEADER + yaml.safe_dump(
        crd(), sort_keys=False, default_flow_style=None, width=LINE_WIDTH, allow_unicode=True
    )


def _root() -> Schema:
    generated = DistTrainJob.model_json_schema(by_alias=True)
    definitions = generated["$defs"]
    properties = generated["properties"]
    root = _structural(
        {key: generated[key] for key in ("type", "description", "x-kubernetes-validations")}, definitions
    )
    root["required"] = ["spec"]
    root["properties"] = _OBJECT_META | {
        "spec": _structural(properties["spec"], definitions),
        "status": _without_defaults(_structural(properties["status"], definitions)),
    }
    return root


def _structural(schema: Schema, definitions: Schema) -> Schema:
    """Rewrites one node and all below it."""
    while inner := _referred(schema, definitions):
        schema = inner | {key: value for key, value in schema.items() if key not in ("$ref", "anyOf")}

    result = {key: value for key, value in schema.items() if key not in _DROPPED}
    if "x-kubernetes-int-or-string" in schema:
        result["anyOf"] = schema["anyOf"]
    if "const" in schema:
        result["enum"] = [schema["const"]]
    for bound in ("minimum", "maximum"):  # OpenAPI 3.0 says with a second keyword that a bound is exclusive
        if (limit := schema.get(exclusive := f"exclusive{bound.capitalize()}")) is not None:
            result |= {bound: limit, exclusive: True}
    if result.get("type") == "integer":
        result["format"] = "int32" if schema.get("maximum", INT32_MAX + 1) <= INT32_MAX else "int64"
    if "properties" in schema:
        result["properties"] = {name: _structural(child, definitions) for name, child in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _structural(schema["additionalProperties"], definitions)
    if "items" in schema:
        result["items"] = _structural(schema["items"], definitions)
    if (default := schema.get("default")) is not None:
        # In full, although the fields have defaults of their own: the API server judges a default by its rules as it stands.
        result["default"] = _without_nulls(default)
    return result


def _referred(schema: Schema, definitions: Schema) -> Schema | None:
    """The schema that this one stands for: that of its $ref, or the one branch of `X | None` that is not null."""
    if "$ref" in schema:
        return definitions[schema["$ref"].removeprefix("#/$defs/")]  # type: ignore[no-any-return]
    if "anyOf" in schema and "x-kubernetes-int-or-string" not in schema:
        (branch,) = [option for option in schema["anyOf"] if option.get("type") != "null"]
        return branch  # type: ignore[no-any-return]
    return None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    return [_without_nulls(child) for child in value] if isinstance(value, list) else value


def _without_defaults(schema: Schema) -> Schema:
    """The status is written whole by the operator: a default of the API server would claim what no operator saw."""
    kept = {key: value for key, value in schema.items() if key != "default"}
    if "properties" in kept:
        kept["properties"] = {name: _without_defaults(child) for name, child in kept["properties"].items()}
    if "items" in kept:
        kept["items"] = _without_defaults(kept["items"])
    return kept


def main(arguments: list[str]) -> int:
    """Prints the CRD; with `--check FILE` says whether the file is up to date."""
    if not arguments:
        sys.stdout.write(render())
        return 0
    if len(arguments) != 2 or arguments[0] != "--check":
        print("usage: python -m disttrain.api.crd [--check FILE]", file=sys.stderr)
        return 2
    file = Path(arguments[1])
    if file.is_file() and file.read_text() == render():
        return 0
    print(f"{file} is stale: run `python -m disttrain.api.crd > {file}`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
