"""DistTrainJob files: read, checked without a cluster, and every problem told with its line, its path, its value and what to do.

The rules themselves are in disttrain.api, the same ones that the API server has. Not here: what a command does with a job.
"""

import difflib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from disttrain.api.crd import crd
from disttrain.api.job import DistTrainJob
from disttrain.api.names import API_VERSION, KIND
from disttrain.cli import yaml_lines
from disttrain.cli.yaml_lines import Path, Value, YamlError
from disttrain.local import objects
from disttrain.manifests import too_large
from disttrain.plan.validity import unsupported_fields

_REFERRED = ("ConfigMap", "Secret", "PersistentVolumeClaim")
"""Kinds that a job may name and that a file may hold beside it."""


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong, or (`warning`) doubtful."""

    file: str
    line: int
    text: str
    warning: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {'warning: ' if self.warning else ''}{self.text}"


class WrongInput(Exception):
    """The file cannot be used. Exit code 2."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True)
class FoundJob:
    """A job, and the lines of its fields."""

    job: DistTrainJob
    file: str
    source: Value

    def problem(self, path: Path, message: str, *, warning: bool = False) -> Problem:
        """A problem of one of the job's fields."""
        text = f"{dotted(path)}: {message}" if path else message
        return Problem(self.file, self.source.line(path), text, warning)

    def not_yet_supported(self) -> list[Problem]:
        """The fields that ask for what this version cannot do."""
        fields = unsupported_fields(self.job.spec)
        return [self.problem(("spec", *path), f"{words} is not supported by this version") for path, words in fields]


@dataclass(frozen=True)
class JobFile:
    """What a file holds."""

    name: str
    jobs: tuple[FoundJob, ...]
    documents: tuple[dict[str, Any], ...]
    """ConfigMaps, Secrets and PersistentVolumeClaims."""
    warnings: tuple[Problem, ...]


def read(name: str, text: str | None = None) -> JobFile:
    """Reads and checks a file. Raises WrongInput with every problem in it."""
    if text is None:
        try:
            text = FilePath(name).read_text(encoding="utf-8")
        except OSError as error:
            raise WrongInput([Problem(name, 1, f"cannot be read: {error.strerror}; check the path")]) from None
        except UnicodeDecodeError as error:
            raise WrongInput([Problem(name, 1, f"is not UTF-8 text: {error.reason}")]) from None
    try:
        values = yaml_lines.load(text)
    except YamlError as error:
        raise WrongInput([Problem(name, error.line, error.message)]) from None

    jobs: list[FoundJob] = []
    documents: list[dict[str, Any]] = []
    problems: list[Problem] = []
    seen: dict[tuple[str, str, str], int] = {}
    for value in values:
        line = value.line(())
        if not isinstance(value.value, dict):
            problems.append(
                Problem(name, line, "a document must be an object with apiVersion, kind, metadata and spec")
            )
            continue
        metadata = value.value.get("metadata")
        if not isinstance(metadata, dict):
            problems.append(
                Problem(name, value.line(("metadata",)), "metadata: an object is required, with at least a name")
            )
            continue
        if "generateName" in metadata and not metadata.get("name"):
            metadata["name"] = f"{metadata['generateName']}{secrets.token_hex(3)[:5]}"
        kind, own_name = str(value.value.get("kind")), str(metadata.get("name"))
        identity = (kind, str(metadata.get("namespace") or "default"), own_name)
        if identity in seen:
            first = seen[identity]
            problems.append(
                Problem(name, value.line(("metadata", "name")), f"{kind} {own_name} is already in line {first}")
            )
            continue
        seen[identity] = line
        if kind == KIND and "apiVersion" not in value.value:
            problems.append(Problem(name, line, f"apiVersion: is required; it is {API_VERSION}"))
        elif kind == KIND:
            try:
                found = FoundJob(DistTrainJob.parse(value.value), name, value)
            except ValidationError as error:
                problems += [Problem(name, value.line(path), text) for path, text in _explain(error)]
                continue
            jobs.append(found)
            # The API server cannot measure it; the operator would refuse the job at its first pod.
            if (large := too_large(found.job)) is not None:
                problems.append(found.problem(large.path, large.message))
        elif kind in _REFERRED:
            found_problems = objects.problems(value.value)
            problems += [Problem(name, value.line(path), f"{dotted(path)}: {text}") for path, text in found_problems]
            documents.append(value.value)
        else:
            close = difflib.get_close_matches(kind, (KIND, *_REFERRED), 1)
            hint = f'; did you mean "{close[0]}"?' if close else f"; this command knows {KIND}, {', '.join(_REFERRED)}"
            problems.append(
                Problem(name, value.line(("kind",)), f'kind: unknown kind "{kind}"{hint}', warning=not close)
            )

    errors = [problem for problem in problems if not problem.warning]
    if not errors and not jobs:
        errors = [
            Problem(name, 1, f"holds no {KIND}; it needs a document with apiVersion: {API_VERSION} and kind: {KIND}")
        ]
    if errors:
        raise WrongInput(sorted(errors))
    return JobFile(name, tuple(jobs), tuple(documents), tuple(problem for problem in problems if problem.warning))


def _explain(error: ValidationError) -> Iterator[tuple[Path, str]]:
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
                where = (*path, *blamed.split(".")) if blamed else path
                yield where, f"{dotted(where)}: {message}" if where else message
        else:
            yield path, f"{dotted(path)}: {_sentence(path, details)}"


def _sentence(path: Path, details: ErrorDetails) -> str:
    node = _schema(path)
    about = f"; it is: {node['description']}" if node and "description" in node else ""
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
        case "model_type" | "dict_type":
            return f"must be an object (got {_shown(details['input'])}){about}"
        case "tuple_type":
            return f"must be a list (got {_shown(details['input'])}){about}"
        case _:
            return f"{details['msg']} (got {_shown(details['input'])}){about}"


def _shown(value: object) -> str:
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
