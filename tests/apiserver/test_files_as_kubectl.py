"""What kubectl reads, or it and the API server refuse, lint and run read or refuse: text by text, value by value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.controlplane import ControlPlane
from cluster.kubectl import KubectlError
from disttrain.cli.files import WrongInput, read
from disttrain.cli.yaml_lines import load

JOB = """\
apiVersion: disttrain.dev/v1alpha1
kind: DistTrainJob
metadata:
  name: digits
spec:
  strategy: {type: DataParallel}
  trainer:
    command: [python, -m, mine]
"""
CONFIG = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"
SECRET = "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n"
CLAIM = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: a}\n"
ROOM = "spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}\n"
LIST = "apiVersion: v1\nkind: List\nitems:\n"
AS_JSON = json.dumps(yaml.safe_load(JOB))


def item(text: str) -> str:
    return "- " + text.replace("\n", "\n  ").rstrip() + "\n"


def with_metadata(line: str) -> str:
    return JOB.replace("  name: digits\n", f"  name: digits\n  {line}\n")


TAKEN = {
    "a list": LIST + item(JOB) + item(CONFIG),
    "a list with metadata": LIST + item(JOB) + "metadata: {resourceVersion: ''}\n",
    "a list of jobs": "apiVersion: disttrain.dev/v1alpha1\nkind: DistTrainJobList\nitems:\n" + item(JOB.split("\n", 2)[2]),
    "empty documents": "---\n---\n# nothing\n---\n" + JOB + "---\nnull\n---\n",
    "end of a document": JOB + "...\n",
    "a comment at the separator": "--- # begin\n" + JOB,
    "a byte order mark": "\ufeff" + JOB,
    "line ends of Windows": JOB.replace("\n", "\r\n"),
    "tabs between words": JOB.replace("type: Data", "type:\tData").replace("trainer:\n", "trainer:\t\n"),
    "JSON": AS_JSON,
    "JSON with tabs": json.dumps(yaml.safe_load(JOB), indent="\t"),
    "JSON with a comment": "# as JSON\n" + AS_JSON,
    "JSON with a comma at the end": AS_JSON[:-1] + ",}",
    "two objects of JSON": AS_JSON + json.dumps(yaml.safe_load(CONFIG)),
    "a merge key": JOB.replace("  trainer:", "  <<: &m {image: a}\n  trainer:"),
    "a null label": with_metadata("labels: {a: }"),
    "what the API server sets": with_metadata("uid: abc\n  generation: 5\n  creationTimestamp: 2024-01-01T00:00:00Z"),
    "managed fields": with_metadata("managedFields: [{manager: x}]"),
    "an owner": with_metadata("ownerReferences: [{apiVersion: v1, kind: ConfigMap, name: x, uid: abc}]"),
    "a finalizer": with_metadata("finalizers: [example.com/mine]"),
    "a finalizer without a domain": with_metadata("finalizers: [mine]"),
    "a status": JOB + "status: {state: 5}\n",
    "null values": CONFIG + "data: {k: }\nimmutable: \n---\n" + JOB,
    "a claim": CLAIM + ROOM + "---\n" + JOB,
    "a whole float": JOB + "  worker: {replicas: 3.0}\n",
    "a truth value of YAML 1.1": JOB + "  suspend: yes\n",
}  # fmt: skip
REFUSED = {
    "a list without items": "apiVersion: v1\nkind: List\n",
    "a list of v2": LIST.replace("v1", "v2") + item(JOB),
    "a list in a list": LIST + item(LIST + item(JOB)),
    "a list with a null": LIST + item(JOB) + "- null\n",
    "a list of what is unknown": LIST.replace("List", "FooList") + item(JOB),
    "a word": "hello\n",
    "a sequence": item(JOB),
    "an empty object": "{}\n---\n" + JOB,
    "a directive": "%YAML 1.1\n---\n" + JOB,
    "content at the separator": "--- {}\n---\n" + JOB,
    "five dashes": JOB + "-----\n" + CONFIG,
    "tabs that indent": JOB.replace("    command", "\tcommand"),
    "UTF-16 without a mark": JOB.encode("utf-16-le").decode("latin-1"),
    "words after JSON": AS_JSON + " xx",
    "an anchor of another document": "x: &a 1\n---\n" + JOB.replace("mine", "*a"),
    "a name that is a number": JOB.replace("digits", "123"),
    "a name that is a truth value": JOB.replace("digits", "yes"),
    "no name": JOB.replace("digits", ""),
    "no metadata": JOB.replace("metadata:\n  name: digits\n", ""),
    "no kind": JOB.replace("kind: DistTrainJob\n", ""),
    "no version": CONFIG.replace("apiVersion: v1\n", ""),
    "an unknown kind": CONFIG.replace("ConfigMap", "Foo"),
    "a kind in lower case": CONFIG.replace("ConfigMap", "configmap"),
    "a version that is a number": JOB.replace("disttrain.dev/v1alpha1", "1"),
    "labels with a number": with_metadata("labels: {a: 1}"),
    "labels with a blank": with_metadata("labels: {'a b': x}"),
    "an annotation with a number": with_metadata("annotations: {a: 1}"),
    "an annotation with two slashes": with_metadata("annotations: {a/b/c: x}"),
    "an unknown field of metadata": with_metadata("label: {a: b}"),
    "a time without an hour": with_metadata("creationTimestamp: 2024-01-01"),
    "an owner without a name": with_metadata("ownerReferences: [{apiVersion: v1, kind: ConfigMap}]"),
    "two ways to wait": with_metadata("finalizers: [foregroundDeletion, orphan]"),
    "a name to generate in upper case": JOB.replace("name: digits", "generateName: Digits-"),
    "a number in a ConfigMap": CONFIG + "data: {k: 1}\n",
    "an unknown field of a ConfigMap": CONFIG + "dat: {}\n",
    "a key in both": CONFIG + "data: {k: a}\nbinaryData: {k: aGk=}\n",
    "a finalizer of a ConfigMap": CONFIG.replace("name: a", "name: a, finalizers: [mine]"),
    "text for base64": SECRET + "data: {k: hello}\n",
    "a number in a Secret": SECRET + "stringData: {k: 1}\n",
    "a certificate without its key": SECRET + "type: kubernetes.io/tls\n",
    "a claim without a spec": CLAIM,
    "a claim with a short mode": CLAIM + ROOM.replace("ReadWriteOnce", "RWO"),
    "a claim of nothing": CLAIM + ROOM.replace("1Gi", "0"),
    "a claim with an unknown field": CLAIM + ROOM.replace("requests", "request"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_kubectl_takes_is_read(control_plane: ControlPlane, tmp_path: Path, name: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(TAKEN[name].encode())
    control_plane.kubectl("create", "--dry-run=server", "-f", str(file))
    assert [found.job.metadata.name for found in read(str(file)).jobs] == ["digits"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_kubectl_or_the_api_server_refuses_is_refused(
    control_plane: ControlPlane, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(REFUSED[name].encode())
    with pytest.raises(KubectlError):
        control_plane.kubectl("create", "--dry-run=server", "-f", str(file))
    with pytest.raises(WrongInput) as refused:
        read(str(file))
    assert "holds no DistTrainJob" not in str(refused.value)


SCALARS = """\
yes no on off y n Y N true True TRUE yEs 010 0o10 0b11 0x1F 1_000 1__0 _1 1:30 1.5 1. .5 1e3 1E3 1e+3 1.0 -0 +5 -0.0 0777 08 09 0_7
-010 0x 1_0.5 1e-4 +.5 -.5e2 0.1e 0b2 685_230.15 190:20:30 1e400 9223372036854775807 9007199254740993 2024-01-01
2024-01-01T00:00:00Z = + - . .e 1.2.3 'yes' "010" !!str~5 !!int~"5" !!bool~"yes" !!float~5""".replace(
    " -\n", "\n"
).split()


def test_a_scalar_has_the_value_that_the_api_server_gets(control_plane: ControlPlane, tmp_path: Path) -> None:
    lines = "".join(f"      v{n}: {text.replace('~', ' ')}\n" for n, text in enumerate(SCALARS) if text != "-")
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("  trainer:\n", f"  trainer:\n    config:\n{lines}"))
    stored = json.loads(control_plane.kubectl("create", "--dry-run=server", "-o", "json", "-f", str(file)))
    (found,) = read(str(file)).jobs
    assert _typed(found.job.spec.trainer.config) == _typed(stored["spec"]["trainer"]["config"])


def _typed(values: dict[str, Any]) -> dict[str, tuple[type, Any]]:
    return {name: (type(value), value) for name, value in values.items()}


def test_a_key_has_the_name_that_the_api_server_gets(control_plane: ControlPlane, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG + "data: {1: a, 1.50: b, yes: c, 0x10: d, 010: e, 1e3: f, 2024-01-01: g, '07': h, .5: i}\n")
    stored = json.loads(control_plane.kubectl("create", "--dry-run=server", "-o", "json", "-f", str(file)))
    assert load(file.read_text()).documents[0].value["data"] == stored["data"]


def test_a_folder_gives_the_files_that_kubectl_takes(control_plane: ControlPlane, tmp_path: Path) -> None:
    for name in ("b.yml", "a.yaml", "c.json", ".d.yaml", "E.YAML", "notes.txt", "in/f.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = name.strip("./").replace("/", "-").lower()
        (tmp_path / name).write_text(json.dumps(yaml.safe_load(JOB.replace("digits", text.replace(".", "-")))))
    made = control_plane.kubectl("create", "--dry-run=server", "-o", "name", "-f", str(tmp_path)).split()
    found = [f"disttrainjob.disttrain.dev/{found.job.metadata.name}" for found in read(str(tmp_path)).jobs]
    assert found == made
