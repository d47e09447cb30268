"""A test that lacks something is skipped with a line that says what; in CI, where that would hide a hole, it fails. And who builds it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import programs

TESTS = Path(__file__).parents[2]


def test_without_ci_it_is_a_skip_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"^missing: etcd$"):
        programs.skip("missing: etcd")


@pytest.mark.parametrize("ci", ["true", "True", "1"])
def test_in_ci_it_is_a_failure(ci: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(pytest.fail.Exception, match=r"^missing: etcd$"):
        programs.skip("missing: etcd")


def test_what_is_missing_is_said_in_one_line_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(programs, "program", lambda name: tmp_path / name)
    with pytest.raises(pytest.skip.Exception) as skipped:
        programs.require("apiserver")
    said = str(skipped.value)
    assert said.startswith("missing: etcd, kube-apiserver")
    assert said.endswith("Run `python tests/cluster/programs.py apiserver` first")
    assert "\n" not in said


def test_a_node_needs_curl_which_asks_its_prometheus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(programs, "program", lambda name: Path(sys.executable))
    monkeypatch.setattr(programs, "_ADMIN_PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    said = programs.missing("cluster")
    assert said is not None
    assert {"containerd", "curl"} <= set(re.split(r"[:,.]? ", said))


def build(folder: Path, go: str | None) -> subprocess.CompletedProcess[str]:
    """Has everything built by a Go that can say no more than its version."""
    if go:
        (folder / "go").write_text(
            f'#!/bin/sh\n[ "$1" = version ] && echo "{go}" && exit\necho "asked to $1"; exit 1\n'
        )
        (folder / "go").chmod(0o755)
    return subprocess.run(
        [sys.executable, programs.__file__, "apiserver"],
        env={"PATH": f"{folder}", "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("go", [None, "go version go1.19.8 linux/amd64", "go version go1.4 linux/amd64", "gccgo 12"])
def test_a_go_that_cannot_fetch_a_newer_one_is_said_in_one_line(go: str | None, tmp_path: Path) -> None:
    done = build(tmp_path, go)
    assert done.returncode == 1
    found = f"{go} at {tmp_path}/go" if go else "no Go"
    assert done.stderr == (
        f"etcd is missing. To build it Go 1.21 or later is needed; found: {found}."
        " Install it from https://go.dev/dl and put it first in PATH\n"
    )
    assert "building" not in done.stdout


@pytest.mark.parametrize("version", ["go1.21.0", "go1.26.8", "go2.0", "devel go1.27-a1b2c3d"])
def test_a_go_that_can_is_asked_to_build(version: str, tmp_path: Path) -> None:
    done = build(tmp_path, f"go version {version} linux/amd64")
    assert "etcd                         building …" in done.stdout
    assert "To build it" not in done.stderr


def test_every_other_test_leaves_the_skipping_to_it() -> None:
    """Of its own a test says only that a system is not the one it is about: no machine that CI has could change that."""
    own = re.compile(r"importorskip\(|pytest\.skip\(|skipif\((?!sys\.platform)")
    ours = {Path(__file__), Path(programs.__file__)}
    files = [file for file in TESTS.rglob("*.py") if file not in ours]
    assert len(files) > 50
    assert [str(file.relative_to(TESTS)) for file in files if own.search(file.read_text())] == []
