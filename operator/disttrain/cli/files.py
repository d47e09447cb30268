"""DistTrainJob files: read, checked without a cluster, and every problem said with its line, its path, its value and what to do.

What `kubectl apply` reads is read, and what it or the API server refuses is refused, all of it at once. The rules for a job are those of
disttrain.api, the same ones that the API server has. Not here: what a command does with a job.
"""

import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, cast

from pydantic import ValidationError

from disttrain.api.job import NAME_RULE, DistTrainJob, Metadata
from disttrain.api.names import API_VERSION, KIND
from disttrain.cli import kinds, metadata, sources, yaml_lines
from disttrain.cli.explain import dotted, explain, shown
from disttrain.cli.sources import Unreadable
from disttrain.cli.yaml_lines import Path, Value
from disttrain.local import objects
from disttrain.manifests import too_large
from disttrain.plan.validity import unsupported_fields

_GROUP_VERSION: Final = re.compile(r"([^/\s]+/)?[^/\s]+")


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong, or (`warning`) doubtful."""

    file: str
    line: int
    """From 1; 0: the file as a whole."""
    text: str
    warning: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {'warning: ' if self.warning else ''}{self.text}"


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

    def factories_by_file(self) -> list[Problem]:
        """The factories that name a file in place of a module. The schema takes them: a package may hold a module named py."""
        return [
            self.problem(
                ("spec", "trainer", *path), f'"{name}" names a file; write the module: {name.replace(".py:", ":")}'
            )
            for path, name in self.job.spec.trainer.factories()
            if ".py:" in name
        ]

    def groups_by_no_pattern(self) -> list[Problem]:
        """The groups of the optimizer whose match Python cannot compile. The schema takes them: the API server knows RE2 alone."""
        optimizer = self.job.spec.trainer.optimizer
        problems = []
        for number, group in enumerate(optimizer.groups if optimizer is not None else ()):
            try:
                re.compile(group.match)
            except (re.error, OverflowError, RecursionError) as error:
                path = ("spec", "trainer", "optimizer", "groups", number, "match")
                problems.append(self.problem(path, f"{group.match!r} is no regular expression of Python: {error}"))
        return problems


@dataclass(frozen=True)
class JobFile:
    """What a file, or all files of a folder, hold."""

    name: str
    jobs: tuple[FoundJob, ...]
    documents: tuple[dict[str, Any], ...]
    """ConfigMaps, Secrets and PersistentVolumeClaims."""
    warnings: tuple[Problem, ...]

    def beside(self, found: FoundJob) -> tuple[dict[str, Any], ...]:
        """The documents that a job can name: those of its namespace, and those that say none and go where the job goes."""
        return tuple(
            document
            for document in self.documents
            if document["metadata"].get("namespace") in (None, "", found.job.metadata.namespace)
        )

    def only(self, verb: str) -> FoundJob:
        """The job of a file that holds one. Raises WrongInput. verb: that which takes one."""
        if len(self.jobs) != 1:
            names = ", ".join(found.job.metadata.name for found in self.jobs)
            text = f"holds {len(self.jobs)} jobs ({names}); a {verb} takes one: put each into a file of its own"
            raise WrongInput([Problem(self.name, 1, text)])
        return self.jobs[0]


def read(name: str, text: str | None = None) -> JobFile:
    """Reads and checks a file, a folder, a URL or standard input. Raises WrongInput with every problem in it.

    text: what the file holds, where it is known.
    """
    reading = _Reading()
    try:
        names = sources.files(name) if text is None else [name]
    except Unreadable as error:
        raise WrongInput([Problem(error.name, error.line, error.message)]) from None
    for file in names:
        try:
            reading.take(file, sources.text(file) if text is None else text)
        except Unreadable as error:
            reading.problems.append(Problem(error.name, error.line, error.message))
    return reading.result(name)


class _Reading:
    """What was read up to now."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._jobs: list[FoundJob] = []
        self._documents: list[dict[str, Any]] = []
        self._seen: dict[tuple[str, str, str, str], tuple[str, int]] = {}
        """Group, kind, namespace and name of the objects, and where they are."""

    def take(self, file: str, text: str) -> None:
        """One more file."""
        contents = yaml_lines.load(text)
        self.problems += [Problem(file, fault.line, fault.message, fault.warning) for fault in contents.faults]
        for document in contents.documents:
            for value in self._objects(file, document):
                self._take_object(file, value)

    def result(self, name: str) -> JobFile:
        """All of it. Raises WrongInput."""
        errors = [problem for problem in self.problems if not problem.warning]
        if not errors and not self._jobs:
            message = f"holds no {KIND}; it needs a document with apiVersion: {API_VERSION} and kind: {KIND}"
            errors = [Problem(name, 1, message)]
        if errors:
            raise WrongInput(sorted(errors))
        return JobFile(name, tuple(self._jobs), tuple(self._documents), tuple(sorted(self.problems)))

    def _objects(self, file: str, document: Value) -> Iterator[Value]:
        """The objects of a document: itself, or the items of a List."""
        body = document.value
        if not isinstance(body, dict):
            self._wrong(file, document, (), "a document must be an object with apiVersion, kind, metadata and spec")
            return
        kind = body.get("kind")
        if not isinstance(kind, str) or not kind.endswith("List"):
            yield document
            return
        items = body.get("items")
        if not isinstance(items, list):
            message = f"items: a {kind} needs a list of objects"
            self._wrong(file, document, ("items",), message if items is None else f"{message} (got {shown(items)})")
            return
        self._check_list_kind(file, document, kind)
        for number, item in enumerate(items):
            path = ("items", number)
            if not isinstance(item, dict):
                message = f"{dotted(path)}: must be an object with apiVersion, kind and metadata (got {shown(item)})"
                self._wrong(file, document, path, message)
                continue
            if kind != "List":  # `kubectl get -o json` of one kind may leave them out
                item.setdefault("apiVersion", body.get("apiVersion"))
                item.setdefault("kind", kind.removesuffix("List"))
            value = document.at(path, item)
            if str(item.get("kind")).endswith("List"):
                message = f"{dotted(path)}: kubectl takes no List within a List; put its objects into the outer one"
                self._wrong(file, document, path, message)
                yield from self._objects(file, value)
            else:
                yield value

    def _check_list_kind(self, file: str, document: Value, kind: str) -> None:
        version = document.value.get("apiVersion")
        if version is None:
            self._wrong(file, document, (), "apiVersion: is required" + ("; it is v1" if kind == "List" else ""))
        elif kind == "List" and version != "v1":
            self._wrong(file, document, ("apiVersion",), f"apiVersion: a List is of v1 (got {shown(version)})")
        elif kind != "List" and (problem := kinds.unknown(str(version), kind.removesuffix("List"))) is not None:
            self._wrong(file, document, ("kind",), f"kind: {problem}")

    def _take_object(self, file: str, value: Value) -> None:
        body: dict[str, Any] = value.value
        version, kind = self._identity(file, value)
        if "items" in body and kind != KIND:
            self._wrong(file, value, ("items",), "items: only a List has items")
        meta = body.get("metadata")
        if meta is not None and not isinstance(meta, dict):
            self._wrong(file, value, ("metadata",), f"metadata: must be an object (got {shown(meta)})")
        elif meta is None:
            self._wrong(file, value, ("metadata",), "metadata: an object is required, with at least a name")
        named = self._metadata(file, value, kind, meta) if isinstance(meta, dict) else None
        if named is not None and not self._is_new(file, value, version, kind, named):
            return
        if not kind:
            return
        if not kinds.is_checked(version, kind):
            self._other_kind(file, value, version, kind)
        elif kind == KIND:
            self._take_job(file, value, version, named)
        else:
            said = {"metadata"} | ({"apiVersion"} if not version else set())
            found = [(path, text) for path, text in objects.problems(body) if not path or path[0] not in said]
            self._wrongs(file, value, found)
            self._documents.append(body)

    def _identity(self, file: str, value: Value) -> tuple[str, str]:
        """apiVersion and kind; as far as they are there, and where one is missing that of a DistTrainJob if the other is."""
        version, kind = value.value.get("apiVersion"), value.value.get("kind")
        for name, given, ours in (("apiVersion", version, API_VERSION), ("kind", kind, KIND)):
            hint = f"; it is {ours}" if kind == KIND or version == API_VERSION else ""
            if given is None or given == "":
                self._wrong(file, value, (), f"{name}: is required{hint}")
            elif not isinstance(given, str):
                self._wrong(file, value, (name,), f"{name}: must be a string{hint} (got {shown(given)})")
        if isinstance(version, str) and version and not _GROUP_VERSION.fullmatch(version):
            self._wrong(
                file, value, ("apiVersion",), f"apiVersion: must be group/version, or v1 (got {shown(version)})"
            )
            version = API_VERSION if kind == KIND else ""
        version = version if isinstance(version, str) and version else API_VERSION if kind == KIND else ""
        kind = kind if isinstance(kind, str) and kind else KIND if version == API_VERSION else ""
        return version, kind

    def _metadata(self, file: str, value: Value, kind: str, meta: dict[str, Any]) -> dict[str, Any] | None:
        """The metadata as the API server would take it; None when something is wrong with it."""
        found = list(metadata.problems(meta, kind))
        name = meta.get("name")
        if not name and isinstance(meta.get("generateName"), str):
            name = f"{meta['generateName']}{secrets.token_hex(3)[:5]}"
        if isinstance(name, str) and name:
            problem = _job_name_problem(name) if kind == KIND else metadata.name_problem(name, kind)
            found += [(("name",), problem)] if problem is not None else []
        self._wrongs(file, value, ((("metadata", *path), text) for path, text in found))
        return None if found else metadata.cleaned({**meta, "name": name})

    def _is_new(self, file: str, value: Value, version: str, kind: str, named: dict[str, Any]) -> bool:
        identity = (version.rpartition("/")[0], kind, named.get("namespace") or "default", named["name"])
        here = (file, value.line(()))
        first = self._seen.setdefault(identity, here)
        if first == here:
            return True
        where = f"line {first[1]}" if first[0] == file else f"{first[0]}:{first[1]}"
        self._wrong(file, value, ("metadata", "name"), f"{kind} {named['name']} is already in {where}")
        return False

    def _other_kind(self, file: str, value: Value, version: str, kind: str) -> None:
        problem = kinds.unknown(version, kind)
        text = problem or f"a {kind} is not checked here; checked are {', '.join(kinds.CHECKED)}"
        self.problems.append(Problem(file, value.line(("kind",)), f"kind: {text}", warning=problem is None))

    def _take_job(self, file: str, value: Value, version: str, named: dict[str, Any] | None) -> None:
        # The API server ignores a status. Metadata with problems must not hide those of the spec.
        body = {name: part for name, part in value.value.items() if name != "status"}
        body |= {"apiVersion": version, "kind": KIND, "metadata": named or {"name": "unnamed"}}
        try:
            job = DistTrainJob.parse(body)
        except ValidationError as error:
            self._wrongs(file, value, explain(error))
            return
        if named is None:
            return
        found_job = FoundJob(job, file, value)
        self._jobs.append(found_job)
        # The API server cannot measure it; the operator would refuse the job at its first pod.
        if (large := too_large(job)) is not None:
            self.problems.append(found_job.problem(large.path, large.message))

    def _wrongs(self, file: str, value: Value, found: Iterable[tuple[Path, str]]) -> None:
        for path, text in found:
            self._wrong(file, value, path, f"{dotted(path)}: {text}" if path else text)

    def _wrong(self, file: str, value: Value, path: Path, text: str) -> None:
        self.problems.append(Problem(file, value.line(path), text))


def _job_name_problem(name: str) -> str | None:
    # The rule belongs to the whole job, and pydantic asks it only when all the rest is right.
    job = cast("Any", DistTrainJob).model_construct(metadata=Metadata(name=name))
    return None if NAME_RULE.check is None or NAME_RULE.check(job) else NAME_RULE.message_for(job)
