"""`disttrain submit` before anything is sent: all that is wrong with the file and the folder of the code, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.cli.main import main

JOB = """\
apiVersion: disttrain.dev/v1alpha1
kind: DistTrainJob
metadata: {name: mine, namespace: team}
spec:
  strategy: {type: DataParallel}
  worker: {replicas: 2}
  checkpoint: {volume: {persistentVolumeClaim: ckpt}}
  trainer:
"""
LOOP = (
    JOB
    + "    {model: mine:model, dataset: mine:dataset, optimizer: {name: SGD, learningRate: 0.1}, maxSteps: 1, batchSize: 4"
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with code, and no cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", "none")
    Path("code").mkdir()
    Path("code/mine.py").write_text("")
    Path("job.yaml").write_text(LOOP + "}\n")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> list[str]:
    assert main(["submit", "job.yaml", *arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


def test_without_a_cluster_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refused(capsys, "--code", "code", code=3)
    assert line.startswith(
        "disttrain: no cluster: there is no kubeconfig at none; set KUBECONFIG to a kubeconfig, or run"
    )


def test_mistakes_of_the_file_the_options_and_the_code_are_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.yaml").write_text(LOOP + "}\n  scheduling: {gang: Native}\n")
    Path("code/random.py").write_text("")
    lines = refused(capsys, "--code", "code", "-n", "other")
    assert [line.partition(": ")[0] for line in lines] == ["code", "job.yaml:3", "job.yaml:10"]
    assert "random.py has the name of a module of Python, which it would replace: rename it" in lines[0]
    assert any("metadata.namespace: is team, and -n says other" in line for line in lines)
    assert any("scheduling.gang Kueue or Native is not supported by this version" in line for line in lines)


def test_a_job_that_names_its_code_gets_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.yaml").write_text(LOOP + ", code: {configMap: there}}\n")
    (line,) = refused(capsys, "--code", "code")
    assert line == "job.yaml:9: spec.trainer.code: the file names the code; leave it out there, or leave out --code"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train.py", "spec.trainer.script.file: code has no train.py; it has mine.py"),
        ("/train.py", "spec.trainer.script.file: code has no /train.py; it has mine.py"),
    ],
)
def test_a_script_is_one_of_the_files_of_its_code(capsys: pytest.CaptureFixture[str], file: str, text: str) -> None:
    Path("job.yaml").write_text(f"{JOB}    script: {{file: {file}}}\n")
    (line,) = refused(capsys, "--code", "code")
    assert line == f"job.yaml:9: {text}"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--timeout", "1h"], "--timeout is of --wait"),
        (["--wait", "--timeout", "soon"], "'soon' is no length of time: write such as 10m or 1h30m"),
        (["--code", "nowhere"], "nowhere: it is no folder; --code takes the one that holds your modules"),
    ],
)
def test_an_option_that_means_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    (line,) = refused(capsys, *options)
    assert text in line


def test_a_file_of_two_jobs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    text = Path("job.yaml").read_text()
    Path("job.yaml").write_text(f"{text}---\n{text.replace('name: mine', 'name: other')}")
    (line,) = refused(capsys)
    assert line == "job.yaml:1: holds 2 jobs (mine, other); a submit takes one: put each into a file of its own"
