"""`disttrain doctor` with no cluster at hand: what this machine has, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disttrain.cli import doctor, machine_checks
from disttrain.cli.main import main
from disttrain.client.findings import Finding, Level


@pytest.fixture(autouse=True)
def _no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.chdir(tmp_path)


def test_without_a_cluster_the_machine_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "-o", "json"])
    found = {one["check"]: one for one in json.loads(capsys.readouterr().out)}
    assert {"python", "packages", "machine", "/dev/shm", "folder", "network", "cluster"} <= set(found)
    assert found["cluster"]["level"] == "note"


@pytest.mark.parametrize(("level", "code"), [(Level.WARNING, 0), (Level.UNKNOWN, 0), (Level.MISSING, 1)])
def test_the_exit_code_says_whether_something_is_missing(
    level: Level, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.machine_checks, "checks", lambda: [Finding("disk", level, "text", "do this")])
    assert main(["doctor"]) == code
    out = capsys.readouterr().out
    assert f"{level.value:<7}  disk" in out
    assert "-> do this" in out
    assert "\x1b" not in out


def test_a_cluster_that_is_asked_for_must_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-n", "team"]) == 3
    assert "there is no kubeconfig at" in capsys.readouterr().out


def test_the_packages_of_an_extra_are_read_from_what_is_installed() -> None:
    listed = [
        "pydantic>=2",
        "torch>=2.10; extra == 'trainer'",
        "kopf<2,>=1.4; extra == 'operator'",
        'rich; extra == "cli"',
    ]
    assert machine_checks.requirements(listed, "trainer") == [("torch", "2.10")]
    assert machine_checks.requirements(listed, "cli") == [("rich", "")]
