"""A test that lacks something is skipped with a line that says what; in CI, where that would hide a hole, it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import programs


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
