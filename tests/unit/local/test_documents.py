"""ConfigMaps and Secrets of a file stand for those of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disttrain.api.job import DistTrainJob
from disttrain.local.documents import Documents
from disttrain.local.references import Unusable

CONFIG = {"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"K": "v", "N": "1"}, "binaryData": {"B": "AAE="}}
SECRET = {
    "kind": "Secret",
    "metadata": {"name": "s"},
    "data": {"K": "c2VjcmV0", "P": "cA=="},
    "stringData": {"P": "plain"},
}
PATH = ("spec", "worker")


def job(*env: dict[str, Any], **container: Any) -> DistTrainJob:
    template = {"spec": {"containers": [{"name": "trainer", "env": list(env), **container}]}}
    spec = {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["x"]}, "worker": {"template": template}}
    return DistTrainJob.parse({"metadata": {"name": "j", "uid": "u"}, "spec": spec})


def environment(described: DistTrainJob, known: dict[str, str] | None = None) -> dict[str, str]:
    fields = {"metadata.name": "j-worker-0"}
    return Documents([CONFIG, SECRET]).environment(described.spec.worker.template, PATH, known or {}, fields)


def reference(kind: str, name: str, key: str, **more: Any) -> dict[str, Any]:
    return {"name": "V", "valueFrom": {f"{kind}KeyRef": {"name": name, "key": key, **more}}}


def test_values_come_from_where_they_would_on_a_cluster() -> None:
    assert environment(job({"name": "V", "value": "plain"})) == {"V": "plain"}
    assert environment(job({"name": "V"})) == {"V": ""}
    assert environment(job(reference("configMap", "c", "K"))) == {"V": "v"}
    assert environment(job(reference("secret", "s", "K"))) == {"V": "secret"}
    assert environment(job(reference("secret", "s", "P"))) == {"V": "plain"}
    assert environment(job(reference("secret", "t", "K", optional=True))) == {"V": ""}
    assert environment(job({"name": "V", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})) == {
        "V": "j-worker-0"
    }


def test_env_from_takes_everything_with_a_prefix_and_env_wins() -> None:
    described = job({"name": "X_K", "value": "mine"}, envFrom=[{"prefix": "X_", "configMapRef": {"name": "c"}}])
    assert environment(described) == {"X_K": "mine", "X_N": "1"}, "binaryData is left out, as the kubelet does"


def test_what_is_optional_and_not_there_is_left_out() -> None:
    sources = [{"configMapRef": {"name": "none", "optional": True}}, {"secretRef": {"name": "s", "optional": True}}]
    described = job(reference("configMap", "c", "none", optional=True), envFrom=sources)
    assert environment(described) == {"K": "secret", "P": "plain", "V": ""}


def test_a_value_refers_to_what_is_before_it_and_to_what_we_set() -> None:
    described = job(
        {"name": "A", "value": "/data/$(RANK)"},
        {"name": "B", "value": "$(A)/$$(A)/$(NONE)"},
        {"name": "NONE", "value": "x"},
    )
    expected = {"RANK": "1", "A": "/data/1", "B": "/data/1/$(A)/$(NONE)", "NONE": "x"}
    assert environment(described, {"RANK": "1"}) == expected


def test_a_variable_of_ours_stands_above_env_from_and_below_env() -> None:
    described = job({"name": "N", "value": "env"}, envFrom=[{"configMapRef": {"name": "c"}}])
    assert environment(described, {"K": "ours", "N": "ours"}) == {"K": "ours", "N": "env"}


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        pytest.param(reference("secret", "t", "K"), 'Secret "t" is not in the file; add it there', id="no such Secret"),
        pytest.param(reference("configMap", "c", "Q"), 'ConfigMap "c" has no key "Q"; it has K, N', id="no such key"),
        pytest.param(
            {"name": "V", "valueFrom": {"resourceFieldRef": {}}}, "cannot be resolved without a cluster", id="of a node"
        ),
        pytest.param({"name": "V", "valueFrom": {"secretKeyRef": {"name": "s"}}}, "is required", id="no key"),
        pytest.param({"name": "V", "value": "a\0b"}, "cannot hold the character NUL", id="NUL"),
    ],
)
def test_what_is_missing_is_named_with_its_place(variable: dict[str, Any], message: str) -> None:
    with pytest.raises(Unusable) as missing:
        environment(job({"name": "A", "value": ""}, variable))
    assert message in missing.value.message
    assert missing.value.path[:8] == (*PATH, "template", "spec", "containers", 0, "env", 1)


def test_a_config_map_is_written_out_as_a_volume_would_show_it(tmp_path: Path) -> None:
    Documents([CONFIG]).write("ConfigMap", "c", tmp_path / "c", ())
    assert {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()} == {"K": b"v", "N": b"1", "B": b"\0\1"}


@pytest.mark.parametrize(
    ("sources", "reported"),
    [
        ({"configMapRef": {"name": "c"}}, "valid list"),
        ([{"configMapRef": "c"}], "ObjectReference"),
        ([{"secretRef": {"name": 3}}], "valid string (got 3)"),
        ([{"secretRef": {}}], "is required"),
        ([{"secretRef": {"name": "nul"}}], "NUL"),
    ],
)
def test_an_env_from_that_cannot_be_understood_is_reported(sources: Any, reported: str) -> None:
    described = job(envFrom=sources)
    nul = {"kind": "Secret", "metadata": {"name": "nul"}, "data": {"K": "AAE="}}
    with pytest.raises(Unusable) as wrong:
        Documents([CONFIG, SECRET, nul]).environment(described.spec.worker.template, PATH, {}, {})
    assert reported in wrong.value.message
    assert wrong.value.path[:7] == (*PATH, "template", "spec", "containers", 0, "envFrom")


def test_a_document_that_an_api_server_would_refuse_is_refused() -> None:
    with pytest.raises(Unusable, match=r"^Secret s: data\.K: must be base64; plain text belongs into stringData$"):
        Documents([{"kind": "Secret", "metadata": {"name": "s"}, "data": {"K": "not base64!"}}])
