"""A refusal of the models in sentences: the path, what is wrong with it, the value, and what the field is.

Not here: lines (files.py), metadata (metadata.py).
"""

import difflib
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from disttrain.api.crd import crd
from disttrain.cli.yaml_lines import Path


def explain(error: ValidationError) -> Iterator[tuple[Path, str]]:
    """The path and the sentence of each problem."""
    found = error.errors(include_url=False)
    for details in found:
        path = tuple(details["loc"])
        if details["type"] == "too_short" and any(
            other["loc"][: len(path)] == path for other in found if other is not details
        ):
            continue  # a list of which entries are wrong counts as one without them
        if details["type"] == "rule":
            for blamed, message in details["ctx"]["broken"]:
                yield (*path, *blamed.split(".")) if blamed else path, message
        else:
            yield path, _sentence(path, details)


def _sentence(path: Path, details: ErrorDetails) -> str:
    node = _schema(path)
    about = f"; it is: {' '.join(node['description'].split())}" if node and "description" in node else ""
    match details["type"]:
        case "missing":
            return f"is required{about}"
        case "extra_forbidden":
            parent = _schema(path[:-1]) or {}
            known = list(parent.get("properties", {}))
            close = difflib.get_close_matches(str(path[-1]), known, 1, 0.6)
            elsewhere = [dotted(home) for home in _homes(str(path[-1]))]
            hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(sorted(known))}"
            return f"unknown field; {f'it belongs to {elsewhere[0]}' if elsewhere and not close else hint}"
        case "duplicate":
            return details["msg"]
        case "origin":
            return f"{details['msg']} (got {shown(details['input'])})"
        case "model_type" | "dict_type":
            return f"must be an object (got {shown(details['input'])}){about}"
        case "tuple_type":
            return f"must be a list (got {shown(details['input'])}){about}"
        case ("int_type" | "int_parsing" | "bool_type" | "bool_parsing") as kind if _is_quoted(details["input"], kind):
            return f"write {details['input']} without quotes (got {shown(details['input'])}){about}"
        case _:
            return f"{details['msg']} (got {shown(details['input'])}){about}"


def _is_quoted(value: object, kind: str) -> bool:
    """Whether a text would be what is wanted, a whole number or a truth value, without its quotes."""
    wanted = r"-?\d{1,19}" if kind.startswith("int") else "true|false"
    return isinstance(value, str) and re.fullmatch(wanted, value, re.ASCII) is not None


def shown(value: object) -> str:
    """A value as JSON; of a long one its begin."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:60]}… of {len(text)} characters"


def dotted(path: Path) -> str:
    """spec.failurePolicy.rules[0].name"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


@cache
def _root_schema() -> dict[str, Any]:
    root: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return root


def _schema(path: Path) -> dict[str, Any] | None:
    """The schema of a path, None where the API knows no such field."""
    node: dict[str, Any] | None = _root_schema()
    for part in path:
        if node is None:
            return None
        node = (
            node.get("items")
            if isinstance(part, int)
            else node.get("properties", {}).get(part, node.get("additionalProperties"))
        )
    return node


@cache
def _homes(field_name: str) -> tuple[Path, ...]:
    """Objects of the spec that have a field of this name, the nearest to the top first."""
    found: list[Path] = []
    level: list[tuple[Path, dict[str, Any]]] = [(("spec",), _root_schema()["properties"]["spec"])]
    while level:
        found += [path for path, node in level if field_name in node.get("properties", {})]
        level = [
            ((*path, name), child)
            for path, node in level
            for name, child in node.get("properties", {}).items()
            if "template" not in path
        ]
    return tuple(found)
