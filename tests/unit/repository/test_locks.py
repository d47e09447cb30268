"""The locks: what an extra needs is in its lock, with hashes, and no lock names where it comes from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
LOCKS = {
    **{extra: [extra] for extra in EXTRAS},
    "all": list(EXTRAS),
    "dev": list(EXTRAS),
    "all-without-torch": list(EXTRAS),
    "dev-without-torch": list(EXTRAS),
    "trainer-without-torch": ["trainer"],
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_for(lock: str) -> set[str]:
    requirements = PROJECT["project"]["dependencies"] + [one for extra in LOCKS[lock] for one in EXTRAS[extra]]
    if lock.startswith("dev"):
        requirements += PROJECT["dependency-groups"]["dev"]
    names = {normal(re.match(r"[A-Za-z0-9._-]+", requirement)[0]) for requirement in requirements}  # type: ignore[index]
    return names - {"torch"} if lock.endswith("without-torch") else names


def names_in(lock: str) -> set[str]:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    return {normal(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", text, re.M)}


def test_every_extra_has_a_lock_and_every_lock_is_known() -> None:
    locks = {file.stem for file in (ROOT / "requirements").glob("*.txt")}
    assert locks == {*LOCKS, "build", "clients", "uv"}


def test_what_the_clients_suite_needs_comes_beside_what_the_tests_have() -> None:
    """It is put on top of .venv: a package in both places would hide the one that everything else is tested with."""
    wanted = {normal(re.match(r"[A-Za-z0-9._-]+", one)[0]) for one in PROJECT["dependency-groups"]["clients"]}  # type: ignore[index]
    assert wanted - names_in("clients") == set()
    assert names_in("clients") & names_in("dev") == set()


@pytest.mark.parametrize("lock", [*LOCKS, "build", "clients", "uv"])
def test_a_lock_holds_what_is_asked_for_each_with_hashes(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    entries = re.split(r"^(?=[A-Za-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.M), flags=re.M)[1:]
    assert entries
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._-]+==\S+( ; [^\\]*)? \\\n", entry), entry.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry.splitlines()[0]
    names = {normal(entry.partition("==")[0]) for entry in entries}
    assert asked_for(lock) - names == set() if lock in LOCKS else lock in names | {"build", "clients"}
    assert "://" not in text


def test_tools_lock_writes_every_lock() -> None:
    script = (ROOT / "tools" / "lock").read_text()
    for lock in (*LOCKS, "build", "clients", "uv"):
        plain = lock.removesuffix("-without-torch")
        assert re.search(rf"^(compile|tool) {plain} |^for name in .*\b{plain}\b", script, re.M), lock
