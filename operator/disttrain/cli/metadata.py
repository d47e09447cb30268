"""metadata of an object of a file, checked as kubectl and the API server would: its fields, names, labels, annotations, owners.

Not here: the further rules for the name of a DistTrainJob (api/job.py).
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from disttrain.api.names import KIND
from disttrain.cli.explain import shown
from disttrain.cli.yaml_lines import Path

Problems = Iterator[tuple[Path, str]]

_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN: Final = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_NAME_PART: Final = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_MOST_ANNOTATIONS: Final = 256 * 1024
"""Bytes of keys and values."""
_STANDARD_FINALIZERS: Final = ("foregroundDeletion", "orphan", "kubernetes")

_TYPES: Final[dict[str, type]] = {
    "name": str,
    "generateName": str,
    "namespace": str,
    "labels": dict,
    "annotations": dict,
    "ownerReferences": list,
    "finalizers": list,
    # What the API server sets itself, and what `kubectl get -o yaml` shows: ignored when it has the right type.
    "uid": str,
    "resourceVersion": str,
    "generation": int,
    "creationTimestamp": str,
    "deletionTimestamp": str,
    "deletionGracePeriodSeconds": int,
    "selfLink": str,
    "managedFields": list,
}
_OWNER: Final[dict[str, type]] = {
    "apiVersion": str,
    "kind": str,
    "name": str,
    "uid": str,
    "controller": bool,
    "blockOwnerDeletion": bool,
}
_TYPE_NAMES: Final = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}

SUBDOMAIN_MESSAGE: Final = "must be a lower-case DNS name: letters, digits, '-' and '.', a letter or digit at each end"


def problems(metadata: Mapping[str, Any], kind: str) -> Problems:
    """What is wrong with the metadata of an object of any kind, as paths within it and sentences."""
    wrong = dict(_typed(metadata, _TYPES))
    yield from wrong.items()
    right = {name: value for name, value in metadata.items() if value is not None and (name,) not in wrong}
    if not right.get("name") and not right.get("generateName") and not wrong.keys() & {("name",), ("generateName",)}:
        yield ("name",), "is required"
    prefix = right.get("generateName", "")
    if prefix and not _SUBDOMAIN.fullmatch(re.sub(r"[-.]$", "a", prefix)):
        yield ("generateName",), f"{SUBDOMAIN_MESSAGE}; it may end with '-' ({_got(prefix)})"
    namespace = right.get("namespace", "")
    if namespace and (len(namespace) > 63 or not _LABEL.fullmatch(namespace)):
        yield (
            ("namespace",),
            f"must be a namespace's name: at most 63 lower-case letters, digits and '-' ({_got(namespace)})",
        )
    for field in ("creationTimestamp", "deletionTimestamp"):
        if field in right and not _is_time(right[field]):
            yield (field,), f'must be a time such as "2026-01-31T12:00:00Z" ({_got(right[field])})'
    yield from _labels(right.get("labels", {}))
    yield from _annotations(right.get("annotations", {}))
    yield from _owners(right.get("ownerReferences", []))
    # Of a custom resource the API server takes a finalizer without a domain, with a warning.
    yield from _finalizers(right.get("finalizers", []), domain=kind != KIND)


def name_problem(name: str, kind: str) -> str | None:
    """What is wrong with a name, for its kind."""
    if kind in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
        return "must be able to stand in a path" if name in (".", "..") or re.search("[/%]", name) else None
    if kind in ("Namespace", "Service"):
        first = name[:1].isalpha() or kind == "Namespace"
        good = len(name) <= 63 and _LABEL.fullmatch(name) and first
        start = ", a letter first" if kind == "Service" else ""
        return None if good else f"must be at most 63 lower-case letters, digits and '-'{start} ({_got(name)})"
    return None if len(name) <= 253 and _SUBDOMAIN.fullmatch(name) else f"{SUBDOMAIN_MESSAGE} ({_got(name)})"


def cleaned(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the API server takes from metadata without problems; the rest it sets itself."""
    kept = ("name", "namespace", "labels", "annotations", "ownerReferences", "finalizers")
    found = {name: metadata[name] for name in kept if metadata.get(name)}
    for name in ("labels", "annotations"):
        if name in found:
            found[name] = {key: "" if value is None else value for key, value in found[name].items()}
    return found


def _typed(fields: Mapping[str, Any], types: Mapping[str, type]) -> Problems:
    for name, value in fields.items():
        wanted = types.get(name)
        if wanted is None:
            close = difflib.get_close_matches(name, types, 1, 0.6)
            yield (name,), f'unknown field; did you mean "{close[0]}"?' if close else "unknown field"
        elif value is not None and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
            quotes = "; put it into quotes" if wanted is str and not isinstance(value, dict | list) else ""
            yield (name,), f"must be {_TYPE_NAMES[wanted]}{quotes} ({_got(value)})"


def _strings(values: Mapping[str, Any]) -> Problems:
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            yield (name,), f"must be a string; put it into quotes ({_got(value)})"


def _labels(labels: Mapping[str, Any]) -> Problems:
    wrong = dict(_strings(labels))
    for name, value in labels.items():
        path = ("labels", name)
        if (name,) in wrong:
            yield path, wrong[(name,)]
        elif value and (len(value) > 63 or not _NAME_PART.fullmatch(value)):
            rule = "at most 63 letters, digits, '-', '_' and '.', a letter or digit at each end"
            yield path, f"a label's value must have {rule} ({_got(value)})"
        if (problem := _qualified(name)) is not None:
            yield path, f"{name!r} cannot name a label: {problem}"


def _annotations(annotations: Mapping[str, Any]) -> Problems:
    wrong = dict(_strings(annotations))
    for name in annotations:
        path = ("annotations", name)
        if (name,) in wrong:
            yield path, wrong[(name,)]
        if (problem := _qualified(name.lower())) is not None:
            yield path, f"{name!r} cannot name an annotation: {problem}"
    size = sum(len(name.encode()) + len(str(value or "").encode()) for name, value in annotations.items())
    if size > _MOST_ANNOTATIONS:
        yield ("annotations",), f"keys and values have {size} bytes; at most {_MOST_ANNOTATIONS}"


def _owners(owners: list[Any]) -> Problems:
    controllers = 0
    for number, owner in enumerate(owners):
        path: Path = ("ownerReferences", number)
        if not isinstance(owner, dict):
            yield path, f"must be an object ({_got(owner)})"
            continue
        wrong = dict(_typed(owner, _OWNER))
        yield from (((*path, *inner), text) for inner, text in wrong.items())
        for name in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(name) and (name,) not in wrong:
                yield (*path, name), "is required"
        if str(owner.get("apiVersion")).count("/") > 1:
            yield (*path, "apiVersion"), f"must be group/version, or v1 ({_got(owner['apiVersion'])})"
        if (owner.get("apiVersion"), owner.get("kind")) in (("v1", "Event"), ("events.k8s.io/v1", "Event")):
            yield (*path, "kind"), "an Event cannot own anything"
        controllers += owner.get("controller") is True
        if controllers > 1 and owner.get("controller") is True:
            yield (*path, "controller"), "only one owner can be the controller"


def _finalizers(finalizers: list[Any], *, domain: bool) -> Problems:
    for number, name in enumerate(finalizers):
        path = ("finalizers", number)
        if not isinstance(name, str):
            yield path, f"must be a string; put it into quotes ({_got(name)})"
        elif (problem := _qualified(name)) is not None:
            yield path, f"{name!r} cannot name a finalizer: {problem}"
        elif domain and "/" not in name and name not in _STANDARD_FINALIZERS:
            yield path, f'a finalizer needs a domain, such as "example.com/{name}" ({_got(name)})'
    if {"foregroundDeletion", "orphan"} <= {name for name in finalizers if isinstance(name, str)}:
        yield ("finalizers",), "foregroundDeletion and orphan exclude each other"


def _qualified(name: str) -> str | None:
    """What is wrong with a name that may have a domain before it."""
    prefix, slash, own = name.rpartition("/")
    if slash and (len(prefix) > 253 or not _SUBDOMAIN.fullmatch(prefix)):
        return "what stands before the '/' must be a lower-case DNS name"
    if len(own) > 63 or not _NAME_PART.fullmatch(own):
        return "at most 63 letters, digits, '-', '_' and '.', a letter or digit at each end, and before it a domain and '/' if needed"
    return None


def _is_time(text: str) -> bool:
    try:
        return bool(_TIME.fullmatch(text)) and datetime.fromisoformat(text) is not None
    except ValueError:
        return False


def _got(value: object) -> str:
    return f"got {shown(value)}"
