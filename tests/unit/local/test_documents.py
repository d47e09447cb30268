"""ConfigMaps and Secrets of a file stand for those of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disttrain.api.job import DistTrainJob
from disttrain.local.documents import Documents, Unusable

CONFIG = {"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"K": "v", "N": 1}, "binaryData": {"B": "AAE="}}
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


def environment(described: DistTrainJob) -> dict[str, str]:
    return Documents([CONFIG, SECRET]).environment(described, described.spec.worker.template, PATH)


def reference(kind: str, name: str, key: str, **more: Any) -> dict[str, Any]:
    return {"name": "V", "valueFrom": {f"{kind}KeyRef": {"name": name, "key": key, **more}}}


def test_values_come_from_where_they_would_on_a_cluster() -> None:
    assert environment(job({"name": "V", "value": "plain"})) == {"V": "plain"}
    assert environment(job({"name": "V"})) == {"V": ""}
    assert environment(job(reference("configMap", "c", "K"))) == {"V": "v"}
    assert environment(job(reference("secret", "s", "K"))) == {"V": "secret"}
    assert environment(job(reference("secret", "s", "P"))) == {"V": "plain"}
    assert environment(job(reference("secret", "t", "K", optional=True))) == {"V": ""}
    assert environment(job({"name": "V", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})) == {"V": "j"}


def test_env_from_takes_everything_with_a_prefix_and_env_wins() -> None:
    described = job({"name": "X_K", "value": "mine"}, envFrom=[{"prefix": "X_", "configMapRef": {"name": "c"}}])
    assert environment(described) == {"X_K": "mine", "X_N": "1", "X_B": "\0\1"}


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        pytest.param(reference("secret", "t", "K"), 'Secret "t" is not in the file; add it there', id="no such Secret"),
        pytest.param(
            reference("configMap", "c", "Q"), 'ConfigMap "c" has no key "Q"; it has B, K, N', id="no such key"
        ),
        pytest.param(
            {"name": "V", "valueFrom": {"resourceFieldRef": {}}}, "cannot be resolved without a cluster", id="of a node"
        ),
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


def test_a_key_that_would_leave_the_folder_is_refused() -> None:
    with pytest.raises(Unusable, match="cannot be a file name"):
        Documents([{"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"../x": ""}}])


def test_data_of_a_secret_that_is_not_base64_is_told() -> None:
    with pytest.raises(Unusable, match="plain text belongs into stringData"):
        Documents([{"kind": "Secret", "metadata": {"name": "s"}, "data": {"K": "not base64!"}}])
