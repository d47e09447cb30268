"""`disttrain convert FILE`: a PyTorchJob, TFJob, TrainJob or RayJob as a DistTrainJob, and line by line what it does not say.

Not here: what becomes what (foreign_jobs.py).
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from disttrain.cli import files, sources, yaml_lines
from disttrain.cli.explain import dotted
from disttrain.cli.files import Problem, WrongInput
from disttrain.cli.foreign import Source
from disttrain.cli.foreign_jobs import KINDS
from disttrain.cli.foreign_jobs import convert as convert_object
from disttrain.cli.lint import problems_of
from disttrain.cli.sources import Unreadable
from disttrain.cli.yaml_lines import Value
from disttrain.client.text import one_line


def convert(name: str, output: str | None) -> int:
    """Writes the result, and what has no counterpart to standard error. 0, or 2 where nothing can be converted, or the result has a fault
    of its own. Raises OSError where the file cannot be written."""
    try:
        bodies, notes = _converted(name)
    except WrongInput as error:
        print(error, file=sys.stderr)
        return 2
    for note in notes:
        print(note, file=sys.stderr)
    text = "---\n".join(yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=120) for body in bodies)
    if output is None:
        print(text, end="")
    else:
        Path(output).write_text(text, encoding="utf-8")
    return _lint(output or "the result", text)


def _converted(name: str) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The objects of the result, and what is said of those of the file. Raises WrongInput."""
    bodies: list[dict[str, Any]] = []
    notes: list[Problem] = []
    jobs = 0
    try:
        texts = [(file, sources.text(file)) for file in sources.files(name)]
    except Unreadable as error:
        raise WrongInput([Problem(error.name, error.line, error.message)]) from None
    for file, text in texts:
        contents = yaml_lines.load(text)
        if faults := [Problem(file, fault.line, fault.message) for fault in contents.faults if not fault.warning]:
            raise WrongInput(faults)
        for value in _objects(contents.documents):
            source = Source(value.value)
            try:
                made = convert_object(source)
            except (AttributeError, TypeError, ValueError, KeyError):
                what = f"is no {one_line(source.look('kind'))} that its operator would take: a field is not of its type; check it there"
                raise WrongInput([Problem(file, value.line(()), what)]) from None
            if made is None:
                bodies.append(value.value)
                continue
            jobs += 1
            bodies.append(made)
            said = {
                Problem(file, value.line(note.path), f"{dotted(note.path)}: {one_line(note.text)}")
                for note in source.all_notes()
            }
            notes += sorted(said)
    if not jobs:
        known = ", ".join(kind for _, kind in KINDS)
        raise WrongInput([Problem(name, 0, f"holds no job that can be converted: {known}")])
    return bodies, notes


def _objects(documents: tuple[Value, ...]) -> Iterator[Value]:
    for document in documents:
        items = document.value.get("items") if isinstance(document.value, Mapping) else None
        if isinstance(items, list):
            yield from (document.at(("items", n), item) for n, item in enumerate(items) if isinstance(item, dict))
        elif isinstance(document.value, Mapping):
            yield document


def _lint(name: str, text: str) -> int:
    """What `disttrain lint` says of the result; 0 where it can be used as it is."""
    try:
        file = files.read(name, text)
    except WrongInput as error:
        print(error, file=sys.stderr)
        return 2
    problems = [problem for found in file.jobs for problem in problems_of(found, file)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 2 if any(not problem.warning for problem in problems) else 0
