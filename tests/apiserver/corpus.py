"""The corpus of inputs: what must be refused, with which message, and what must be accepted. Both layers read it: API server and models.

inputs/good holds whole files. What is wrong, or changes, is a case of inputs/bad.yaml or inputs/transition.yaml: a base job and a patch.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

INPUTS = Path(__file__).parent / "inputs"
Body = dict[str, Any]

TOO_LONG: list[Body] = [
    {
        "name": "too many arguments",
        "base": "command",
        "patch": {"spec.trainer.command": ["x"] * 257},
        "expected": r"spec\.trainer\.command.*at most 256",
    },
    {
        "name": "argument too long",
        "base": "command",
        "patch": {"spec.trainer.command": ["x", "y" * 4097]},
        "expected": r"spec\.trainer\.command\[1\].*(may not be more than|at most) 4096",
    },
    {
        "name": "command too long",
        "base": "command",
        "patch": {"spec.trainer.command": ["x"] + ["y" * 4096] * 16},
        "expected": r"spec\.trainer\.command.*at most 65536 characters",
    },
    {
        "name": "script arguments too long",
        "base": "command",
        "patch": {"spec.trainer": {"script": {"file": "a.py", "args": ["y" * 4096] * 17}}},
        "expected": r"spec\.trainer\.script\.args.*at most 65536 characters",
    },
    {
        "name": "sidecar with too many arguments",
        "base": "command",
        "patch": {"spec.worker.template.spec.containers": [{"name": "side", "image": "side:1", "args": ["x"] * 257}]},
        "expected": r"spec\.worker\.template\.spec\.containers\[0\]\.args.*at most 256",
    },
    {
        "name": "too many variables",
        "patch": {
            "spec.worker.template.spec.containers": [
                {"name": "trainer", "env": [{"name": f"A{n}", "value": "x"} for n in range(257)]}
            ]
        },
        "expected": r"spec\.worker\.template\.spec\.containers\[0\]\.env.*at most 256",
    },
    {
        "name": "too many failure rules",
        "patch": {
            "spec.failurePolicy.rules": [{"name": f"r{n}", "onExitCodes": [1], "action": "FailJob"} for n in range(21)]
        },
        "expected": r"spec\.failurePolicy\.rules.*at most 20",
    },
]
"""Cases of bad.yaml whose values are too long to write there."""


@dataclass(frozen=True)
class Case:
    """An object, what it was before (of a transition), and what the message about it must match: nothing, where it is accepted."""

    name: str
    body: Body
    expected: tuple[str, ...]
    before: Body | None = None

    @property
    def mistakes(self) -> int:
        """How many causes the API server lists, one for each field that `expected` names."""
        return max(1, sum(pattern.startswith("spec") for pattern in self.expected))

    def unmatched(self, message: str) -> list[str]:
        """The patterns that a message does not match. Line ends do not count."""
        flat = " ".join(message.split())
        return [pattern for pattern in self.expected or ("^$",) if not re.search(pattern, flat)]

    def write(self, folder: Path) -> str:
        """The path of a file with the object."""
        file = folder / "job.yaml"
        file.write_text(yaml.safe_dump(self.body, sort_keys=False))
        return str(file)


def bad() -> list[Case]:
    return [_case(_read("bases")[entry.get("base", "servers")], entry) for entry in [*_read("bad"), *TOO_LONG]]


def transitions() -> list[Case]:
    """Each with a name of its own for the object, since they meet in one namespace."""
    document = _read("transition")
    cases = []
    for number, entry in enumerate(document["cases"]):
        before = _patched(_read("bases")["servers"], {"metadata.name": f"t{number}"} | entry.get("before", {}))
        status = {"status": document["statuses"][entry["status"]]} if "status" in entry else {}
        cases.append(replace(_case(before, entry), before=before | status))
    return cases


def good() -> list[Path]:
    return sorted((INPUTS / "good").glob("*.yaml"))


def named(cases: Iterable[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases]


def _case(base: Body, entry: Body) -> Case:
    expected = entry.get("expected", [])
    patterns = (expected,) if isinstance(expected, str) else tuple(expected)
    return Case(entry["name"], _patched(base, entry.get("patch", {}), entry.get("remove", ())), patterns)


def _patched(base: Body, patch: Mapping[str, Any], remove: Iterable[str] = ()) -> Body:
    """A copy of a job with values set and others removed, by their paths: `spec.worker.replicas`."""
    body = copy.deepcopy(base)
    for path, value in patch.items():
        *parents, last = path.split(".")
        functools.reduce(lambda at, part: at.setdefault(part, {}), parents, body)[last] = value
    for path in remove:
        *parents, last = path.split(".")
        del functools.reduce(lambda at, part: at[part], parents, body)[last]
    return body


@functools.cache
def _read(name: str) -> Any:
    return yaml.safe_load((INPUTS / f"{name}.yaml").read_text())
