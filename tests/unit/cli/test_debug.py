"""`disttrain debug` of what is no run, and of one that is over."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from disttrain.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no run nowhere"),
        (["digits-1", "-o", "x.zip"], "name an archive that ends with .tar.gz"),
        (["digits-1"], "is over and has no stacks; -o digits-1.tar.gz takes its logs along"),
        (["digits-2"], "run.json is damaged"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for run, content in (("digits-1", '{"uid": "a", "attempt": 1}'), ("digits-2", "[]")):
        Path(".disttrain/runs", run).mkdir(parents=True)
        Path(".disttrain/runs", run, "run.json").write_text(content)
    assert main(["debug", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert main(["debug", "digits-1", "-o", "d.tar.gz"]) == 0
    with tarfile.open("d.tar.gz") as archive:
        assert {"d/stacks.txt", "d/run.json", "d/machine.json", "d/versions.txt"} == set(archive.getnames())
