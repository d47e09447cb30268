"""What README and docs/ show can be copied: jobs are valid, commands have the options that they are shown with, files are there."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from disttrain.cli import files
from disttrain.cli.main import main
from disttrain_trainer import session

PAGES = [Path("README.md"), *sorted(Path("docs").rglob("*.md"))]
JOB = next(
    yaml.safe_load(block)
    for block in re.findall(r"^```yaml\n(.*?)^```", Path("docs/guide/your-own-model.md").read_text(), re.M | re.S)
)
"""A complete job, into which the parts of one that the pages show are put."""


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """The page and line of each block, and its text."""
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
            yield f"{page}:{text.count(chr(10), 0, found.start()) + 1}", found[1]


def commands() -> list[str]:
    """Each `disttrain VERB ...` with an argument, of console blocks and of the text."""
    lines = [line.removeprefix("$ ") for _, block in blocks("console") for line in block.splitlines()]
    spans = [span for page in PAGES for span in re.findall(r"`([^`\n]+)`", page.read_text())]
    shown = [line.partition("#")[0].strip().removeprefix(".venv/bin/") for line in [*lines, *spans]]
    return sorted({line for line in shown if re.match(r"disttrain [a-z]+ \S", line)})


def merged(into: dict[str, object], part: dict[str, object]) -> dict[str, object]:
    return into | {
        name: merged(old, value) if isinstance(old := into.get(name), dict) and isinstance(value, dict) else value
        for name, value in part.items()
    }


@pytest.mark.parametrize(("place", "text"), [pytest.param(*one, id=one[0]) for one in blocks("yaml")])
def test_a_job_or_a_part_of_one_is_valid(place: str, text: str) -> None:
    shown = yaml.safe_load(text)
    job = shown if "kind" in shown else JOB | {"spec": merged(JOB["spec"], shown)}
    if "kind" not in shown and "strategy" in shown:
        job["spec"]["strategy"] = shown["strategy"]
    files.read("job.yaml", yaml.safe_dump(job))


@pytest.mark.parametrize("command", commands())
def test_the_command_has_the_options_that_it_is_shown_with(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert main(shlex.split(command.replace("|", "-"))[1:]) in (2, 3), (
        "the file or the cluster is not there; wrong options raise SystemExit"
    )


@pytest.mark.parametrize(("place", "text"), [pytest.param(*one, id=one[0]) for one in blocks("python")])
def test_a_program_can_be_compiled_and_calls_what_a_session_has(place: str, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "session":
            assert callable(getattr(session, node.attr))


def test_files_of_this_repository_that_the_pages_name_are_there() -> None:
    named = {
        (str(page), path)
        for page in PAGES
        for path in re.findall(
            r"(?<![\w/.{-])((?:examples|deploy|docs|tests|tools|benchmarks)/[\w./-]*\w)", page.read_text()
        )
    }
    assert [one for one in named if not Path(one[1]).exists()] == []
