"""What a job names and finds beside it in its file: ConfigMaps and Secrets, for scripts and for environment variables.

A cluster has these objects; here the documents of the file stand for them. Not here: PersistentVolumeClaims, which need no document and
become folders (folders.py).
"""

import base64
import binascii
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from disttrain.api.job import DistTrainJob
from disttrain.api.names import TRAINER_CONTAINER
from disttrain.api.template import Container, PodTemplate

FieldPath: TypeAlias = tuple[str | int, ...]


class Unusable(Exception):
    """The job cannot run here as it is written. `path` is the field to blame."""

    def __init__(self, path: FieldPath, message: str) -> None:
        super().__init__(message)
        self.path = path
        self.message = message


class Documents:
    """The ConfigMaps and Secrets of a file."""

    def __init__(self, documents: Iterable[Mapping[str, Any]]) -> None:
        self._content: dict[tuple[str, str], dict[str, bytes]] = {}
        for document in documents:
            kind, name = str(document["kind"]), str(document["metadata"]["name"])
            if kind in ("ConfigMap", "Secret"):
                self._content[kind, name] = _content(document)

    def content(self, kind: str, name: str, path: FieldPath) -> dict[str, bytes]:
        """The data of a ConfigMap or Secret. Raises Unusable."""
        try:
            return self._content[kind, name]
        except KeyError:
            raise Unusable(path, f'{kind} "{name}" is not in the file; add it there as a document of its own') from None

    def value(self, kind: str, name: str, key: str, path: FieldPath) -> str:
        """One entry as text. Raises Unusable."""
        content = self.content(kind, name, path)
        if key not in content:
            raise Unusable(path, f'{kind} "{name}" has no key "{key}"; it has {", ".join(sorted(content)) or "none"}')
        return content[key].decode(errors="replace")

    def write(self, kind: str, name: str, folder: Path, path: FieldPath) -> None:
        """Writes a ConfigMap or Secret out, a file for each key, as a volume would show it."""
        content = self.content(kind, name, path)
        folder.mkdir(parents=True, exist_ok=True)
        for key, data in content.items():
            (folder / key).write_bytes(data)

    def environment(self, job: DistTrainJob, template: PodTemplate | None, path: FieldPath) -> dict[str, str]:
        """The variables that a role's template sets for its training container. Raises Unusable."""
        containers = (template and template.spec and template.spec.containers) or ()
        variables: dict[str, str] = {}
        for position, container in enumerate(containers):
            if container.name == TRAINER_CONTAINER:
                where = (*path, "template", "spec", "containers", position)
                variables |= self._sources(container, where)
                for number, variable in enumerate(container.env or ()):
                    found = variable.value or ""
                    if variable.value_from is not None:
                        found = self._resolve(job, variable.value_from, (*where, "env", number, "valueFrom")) or ""
                    variables[variable.name] = found
        return variables

    def _sources(self, container: Container, path: FieldPath) -> dict[str, str]:
        """envFrom: every entry of a ConfigMap or Secret."""
        variables: dict[str, str] = {}
        for number, source in enumerate((container.model_extra or {}).get("envFrom") or ()):
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if reference := source.get(field):
                    where = (*path, "envFrom", number)
                    if reference.get("optional") and (kind, reference["name"]) not in self._content:
                        continue
                    for key, data in self.content(kind, reference["name"], where).items():
                        variables[source.get("prefix", "") + key] = data.decode(errors="replace")
        return variables

    def _resolve(self, job: DistTrainJob, source: dict[str, Any], path: FieldPath) -> str | None:
        for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
            if reference := source.get(field):
                if reference.get("optional") and reference.get("key") not in self._content.get(
                    (kind, reference.get("name")), {}
                ):
                    return None
                return self.value(kind, str(reference.get("name")), str(reference.get("key")), (*path, field))
        known = {
            "metadata.name": job.metadata.name,
            "metadata.namespace": job.metadata.namespace,
            "metadata.uid": job.metadata.uid,
        }
        field_path = (source.get("fieldRef") or {}).get("fieldPath")
        if field_path in known:
            return known[field_path]
        raise Unusable(
            path, "cannot be resolved without a cluster; set a value, or a key of a ConfigMap or Secret of the file"
        )


def _content(document: Mapping[str, Any]) -> dict[str, bytes]:
    name = f"{document['kind']} {document['metadata']['name']}"
    content: dict[str, bytes] = {}
    try:
        encoded = dict(document.get("binaryData") or {})
        if document["kind"] == "Secret":
            encoded |= document.get("data") or {}
            content |= {key: str(text).encode() for key, text in (document.get("stringData") or {}).items()}
        else:
            content |= {key: str(text).encode() for key, text in (document.get("data") or {}).items()}
        content |= {
            key: base64.b64decode(str(text), validate=True) for key, text in encoded.items() if key not in content
        }
    except binascii.Error:
        raise Unusable((), f"{name}: data must be base64; plain text belongs into stringData") from None
    for key in content:
        if "/" in key or key in ("", ".", ".."):
            raise Unusable((), f"{name}: the key {key!r} cannot be a file name")
    return content
