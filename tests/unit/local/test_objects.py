"""ConfigMaps and Secrets of a file are checked as an API server would check them."""

from __future__ import annotations

from typing import Any

import pytest

from disttrain.local import objects

NAMED = {"metadata": {"name": "c"}}
NO_KEY = "is no key: letters, digits, '-', '_' and '.', and it must be able to name a file"
PLAIN = "must be base64; plain text belongs into stringData"
QUOTES = "must be a string; put it into quotes"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"kind": "ConfigMap"}, ["metadata: is required"]),
        ({"kind": "ConfigMap", "metadata": "c"}, ["metadata: must be an object"]),
        ({"kind": "ConfigMap", "metadata": {}}, ["metadata.name: is required"]),
        ({"kind": "ConfigMap", "metadata": {"name": "C"}}, ["metadata.name: must be a lower-case DNS name"]),
        ({"kind": "ConfigMap", **NAMED, "apiVersion": "v2"}, ["apiVersion: must be v1"]),
        ({"kind": "ConfigMap", **NAMED, "data": ["a", "b"]}, ["data: must be an object: a value for each key"]),
        ({"kind": "ConfigMap", **NAMED, "data": {"a": 1, "b": True}}, [f"data.a: {QUOTES}", f"data.b: {QUOTES}"]),
        ({"kind": "ConfigMap", **NAMED, "data": {"../x": ""}}, [f"data.../x: {NO_KEY}"]),
        ({"kind": "ConfigMap", **NAMED, "data": {"..": "", "a/b": ""}}, [f"data...: {NO_KEY}", f"data.a/b: {NO_KEY}"]),
        ({"kind": "ConfigMap", **NAMED, "binaryData": {"k": "?"}}, ["binaryData.k: must be base64"]),
        ({"kind": "Secret", **NAMED, "data": {"k": "hello"}}, [f"data.k: {PLAIN}"]),
        ({"kind": "Secret", **NAMED, "data": {"k": "grün"}}, [f"data.k: {PLAIN}"]),
        ({"kind": "Secret", **NAMED, "data": {"k": 5}}, [f"data.k: {QUOTES}"]),
        ({"kind": "Secret", **NAMED, "stringData": "x"}, ["stringData: must be an object: a value for each key"]),
        ({"kind": "PersistentVolumeClaim", "metadata": {}}, ["metadata.name: is required", "spec: is required"]),
        ({"kind": "Namespace", "metadata": {}}, []),
    ],
)
def test_what_is_wrong_is_reported_with_its_place(document: dict[str, Any], message: list[str]) -> None:
    assert [f"{'.'.join(map(str, path))}: {text}" for path, text in objects.problems(document)] == message


def test_what_is_right_is_taken_as_it_is() -> None:
    wrapped = "QUFB\nQUFB\r\n"  # as `base64` writes it
    config = objects.parse(
        {"kind": "ConfigMap", **NAMED, "data": {"a": "ü", "none": None}, "binaryData": {"b": wrapped}}
    )
    secret = objects.parse({"kind": "Secret", **NAMED, "data": {"a": wrapped, "b": "eA=="}, "stringData": {"b": "y"}})
    assert config is not None
    assert config.files() == {"a": "ü".encode(), "none": b"", "b": b"AAAAAA"}
    assert config.variables() == {"a": "ü".encode(), "none": b""}
    assert secret is not None
    assert secret.files() == secret.variables() == {"a": b"AAAAAA", "b": b"y"}
