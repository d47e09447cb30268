"""What a job names and finds beside it in its file: ConfigMaps and Secrets, for code and for environment variables.

A cluster has these objects; here the documents of the file stand for them. Not here: what makes a good document (objects.py), and
PersistentVolumeClaims, which need no document and become folders (folders.py).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from disttrain.api.names import TRAINER_CONTAINER
from disttrain.api.template import Container, PodTemplate
from disttrain.local import objects
from disttrain.local.expansion import expanded
from disttrain.local.objects import ConfigMap, Secret
from disttrain.local.references import ENV_FROM, VALUE_FROM, FieldPath, ObjectReference, Unusable, understood


class Documents:
    """The ConfigMaps and Secrets of a file. Raises Unusable for one that the API server would refuse."""

    def __init__(self, documents: Iterable[Mapping[str, Any]]) -> None:
        self._objects: dict[tuple[str, str], ConfigMap | Secret] = {}
        for document in documents:
            for path, message in objects.problems(document):
                raise Unusable((), f"{objects.title(document)}: {'.'.join(map(str, path))}: {message}")
            if (parsed := objects.parse(document)) is not None:
                self._objects[str(document["kind"]), parsed.metadata.name] = parsed

    def config_map(self, name: str) -> ConfigMap | None:
        """A ConfigMap of the file, None when it is not there."""
        found = self._objects.get(("ConfigMap", name))
        return found if isinstance(found, ConfigMap) else None

    def write(self, kind: str, name: str, folder: Path, path: FieldPath) -> None:
        """Writes a ConfigMap or Secret out, a file for each key, as a volume would show it."""
        content = self._object(kind, name, path).files()
        folder.mkdir(parents=True, exist_ok=True)
        for key, data in content.items():
            (folder / key).write_bytes(data)

    def entry(self, kind: str, name: str, key: str, path: FieldPath) -> bytes:
        """What a ConfigMap or Secret holds under a key. Raises Unusable."""
        return _entry(self._object(kind, name, path).files(), f'{kind} "{name}"', key, path)

    def entries(self, kind: str, name: str, path: FieldPath) -> dict[str, bytes]:
        """All that a ConfigMap or Secret holds. Raises Unusable."""
        return self._object(kind, name, path).files()

    def environment(
        self, template: PodTemplate, path: FieldPath, known: Mapping[str, str], fields: Mapping[str, str]
    ) -> dict[str, str]:
        """The variables of a role's training container: `known`, and those that its template sets. Raises Unusable.

        As in a pod, `known` stands above envFrom, and env above both. A value of env may refer to every variable above it.
        fields: those of the pod that valueFrom.fieldRef may name.
        """
        variables = dict(known)
        for position, container in enumerate(template.containers):
            if container.name == TRAINER_CONTAINER:
                where = (*path, "template", "spec", "containers", position)
                replaced = {variable.name for variable in container.env or ()}
                variables = self._sources(container, where) | {k: v for k, v in known.items() if k not in replaced}
                for number, variable in enumerate(container.env or ()):
                    own = (*where, "env", number)
                    if variable.value_from is None:
                        found = expanded(variable.value or "", variables)
                    else:
                        found = self._resolve(fields, variable.value_from, (*own, "valueFrom")) or ""
                    variables[variable.name] = _usable(found, own)
        return variables

    def _object(self, kind: str, name: str, path: FieldPath) -> ConfigMap | Secret:
        try:
            return self._objects[kind, name]
        except KeyError:
            raise Unusable(path, f'{kind} "{name}" is not in the file; add it there as a document of its own') from None

    def _sources(self, container: Container, path: FieldPath) -> dict[str, str]:
        """envFrom: every entry of a ConfigMap or Secret."""
        variables: dict[str, str] = {}
        listed = (container.model_extra or {}).get("envFrom")
        sources = [] if listed is None else understood(ENV_FROM, listed, (*path, "envFrom"))
        for number, source in enumerate(sources):
            where = (*path, "envFrom", number)
            for kind, reference in (("ConfigMap", source.config_map), ("Secret", source.secret)):
                if reference is None or self._left_out(kind, reference):
                    continue
                for key, data in self._object(kind, reference.name, where).variables().items():
                    variables[source.prefix + key] = _usable(data.decode(errors="replace"), where)
        return variables

    def _left_out(self, kind: str, reference: ObjectReference) -> bool:
        return reference.optional and (kind, reference.name) not in self._objects

    def _resolve(self, fields: Mapping[str, str], source: Mapping[str, Any], path: FieldPath) -> str | None:
        parsed = understood(VALUE_FROM, source, path)
        for kind, field, reference in (
            ("ConfigMap", "configMapKeyRef", parsed.config_map),
            ("Secret", "secretKeyRef", parsed.secret),
        ):
            if reference is not None:
                if self._left_out(kind, reference):
                    return None
                content = self._object(kind, reference.name, (*path, field)).variables()
                if reference.optional and reference.key not in content:
                    return None
                found = _entry(content, f'{kind} "{reference.name}"', reference.key, (*path, field))
                return found.decode(errors="replace")
        if parsed.field is not None and parsed.field.field_path in fields:
            return fields[parsed.field.field_path]
        raise Unusable(
            path, "cannot be resolved without a cluster; set a value, or a key of a ConfigMap or Secret of the file"
        )


def _entry(content: Mapping[str, bytes], owner: str, key: str, path: FieldPath) -> bytes:
    if key not in content:
        raise Unusable(path, f'{owner} has no key "{key}"; it has {", ".join(sorted(content)) or "none"}')
    return content[key]


def _usable(value: str, path: FieldPath) -> str:
    if "\0" in value:
        raise Unusable(
            path, "an environment variable cannot hold the character NUL; mount the object as a file instead"
        )
    return value
