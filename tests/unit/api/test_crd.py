"""The generated schema, without an API server: nothing in a spec is without a limit. What the server makes of it: tests/apiserver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from disttrain.api import crd
from disttrain.api.template import Container
from disttrain.api.types import Quantity

Schema = dict[str, Any]


def unbounded(schema: Schema, path: str) -> Iterator[str]:
    """Every limit that a schema and what is in it lack, with the path; [0] stands for an entry of a list, KEY for one of a map."""
    wanted = {
        "array": {"maxItems"},
        "string": set() if "enum" in schema else {"maxLength"},
        "integer": {"minimum", "maximum"},
        "number": {"minimum", "maximum"},
        "quantity": {"minimum", "maximum", "maxLength"},
        "boolean": set(),
        "object": {"maxProperties"} if "additionalProperties" in schema else set(),
    }
    limits = wanted[
        "quantity" if schema.get("x-kubernetes-int-or-string") else schema.get("type", "object")
    ]  # none: origin.py
    # An object that is handed on as it is has the limit of the whole: what etcd takes. Its typed fields have limits of their own.
    if not schema.get("x-kubernetes-preserve-unknown-fields"):
        yield from (f"{path}: {limit}" for limit in sorted(limits - schema.keys()))
    for name, child in schema.get("properties", {}).items():
        yield from unbounded(child, f"{path}.{name}")
    if "items" in schema:
        yield from unbounded(schema["items"], f"{path}[0]")
    if "additionalProperties" in schema:
        yield from unbounded(schema["additionalProperties"], f"{path}.KEY")


def test_every_list_text_map_and_number_of_a_spec_has_a_limit() -> None:
    root = crd.crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert list(unbounded(root["properties"]["spec"], "spec")) == []


def test_a_limit_that_lacks_would_be_seen() -> None:
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {
        "type": "object",
        "properties": {
            "words": {"type": "array", "items": {"type": "string"}},
            "either": {"enum": ["a", "b"], "type": "string"},
            "open": free | {"properties": {"number": {"type": "integer", "minimum": 0}}},
            "map": {"type": "object", "additionalProperties": free},
            "amount": {"x-kubernetes-int-or-string": True, "minimum": 0, "maximum": 9},
        },
    }
    assert list(unbounded(schema, "spec")) == [
        "spec.words: maxItems",
        "spec.words[0]: maxLength",
        "spec.open.number: maximum",
        "spec.map: maxProperties",
        "spec.amount: maxLength",
    ]


@pytest.mark.parametrize("field", ["command", "args"])
def test_a_sidecar_may_say_much_and_not_everything(field: str) -> None:
    side = {"name": "side", "image": "side:1"}
    assert Container.model_validate({**side, field: ["x" * 32_768] * 256})
    with pytest.raises(ValidationError, match="at most 256 items"):
        Container.model_validate({**side, field: ["x"] * 257})
    with pytest.raises(ValidationError, match="at most 32768 characters"):
        Container.model_validate({**side, field: ["x" * 32_769]})


def test_a_quantity_without_a_suffix_is_a_number_that_json_can_say() -> None:
    quantity = TypeAdapter[int | str](Quantity)
    assert quantity.validate_python(2**53 - 1) == 2**53 - 1
    assert quantity.validate_python("9Ei") == "9Ei"
    with pytest.raises(ValidationError, match="must be a Kubernetes quantity"):
        quantity.validate_python(2**53)
