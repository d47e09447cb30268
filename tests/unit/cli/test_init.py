"""`disttrain init`: the files of a new job can be used as they are, and what was there stays."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.cli.main import main
from disttrain.cli.templates import Choices, Way, files


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "My_Spirals 2").mkdir()
    monkeypatch.chdir(tmp_path / "My_Spirals 2")


@pytest.mark.parametrize("way", list(Way))
def test_each_job_is_without_a_fault_and_names_the_module_beside_it(
    way: Way, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "mine", "--strategy", way.lower(), "--workers", "3"]) == 0
    assert capsys.readouterr().out == "mine.yaml\nmine.py\n"
    compile(Path("mine.py").read_text(), "mine.py", "exec")
    assert main(["lint", "mine.yaml"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("mine.yaml: mine: ok\n", "")
    assert "replicas: 3" in Path("mine.yaml").read_text()


def test_the_name_is_that_of_the_folder_and_no_module_hides_one_of_python() -> None:
    assert main(["init"]) == 0
    assert Path("my-spirals-2.yaml").is_file()
    assert list(files(Choices("json", Way.SCRIPT, 1))) == ["json.yaml", "json_model.py"]


def test_files_that_are_there_stay_unless_force_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("mine")
    assert main(["init", "mine"]) == 2
    assert capsys.readouterr().err == "init: mine.py: there already; choose another NAME, or --force to write over it\n"
    assert (Path("mine.py").read_text(), Path("mine.yaml").exists()) == ("mine", False)
    assert main(["init", "mine", "--force"]) == 0


@pytest.mark.parametrize(
    "arguments", [["My_Job"], ["9lives"], ["x" * 41], ["a", "--workers", "0"], ["a", "--strategy", "s"]]
)
def test_a_wrong_answer_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(Path().iterdir())


def test_a_terminal_is_asked_for_what_no_option_says() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "disttrain.cli.main", "init", "--workers", "1"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as child:
        os.write(ours, b"asked\nParameterServer\n")
        assert child.wait() == 0
    os.close(theirs)
    os.close(ours)
    assert "type: ParameterServer" in Path("asked.yaml").read_text()
