"""The command itself: quick, honest about its verbs, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from disttrain import __version__
from disttrain.cli.main import main

GOOD = str(Path("examples/command.yaml"))


def test_help_is_quick_and_lists_what_there_is() -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [Path(sys.executable).with_name("disttrain"), "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5
    assert all(f"    {verb} " in done.stdout for verb in ("run", "lint", "version"))
    assert "submit" not in done.stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = "('pydantic', 'yaml', 'rich', 'asyncio')"
    program = f"import sys, disttrain.cli.main as m; m._parser(); print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"disttrain {__version__}\n"


def test_lint_says_ok_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", GOOD, "examples/mlp-sync.yaml"]) == 0
    told = capsys.readouterr()
    assert told.out == f"{GOOD}: command: ok\nexamples/mlp-sync.yaml: mlp-sync: ok\n"
    assert "warning: spec: without checkpoint a restart of the job begins at step 0" in told.err


def test_lint_tells_what_this_version_cannot_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(Path(GOOD).read_text() + "  network: {tls: Mutual}\n")
    assert main(["lint", str(file)]) == 2
    assert "network.tls Mutual is not supported by this version" in capsys.readouterr().err


def test_lint_finds_a_script_that_its_config_map_lacks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(Path("examples/torchrun-script.yaml").read_text().replace("file: train.py", "file: trian.py"))
    assert main(["lint", str(file)]) == 2
    assert (
        'spec.trainer.script.file: ConfigMap "torchrun-script" has no key "trian.py"; it has train.py'
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(
            ("spec:\n", "spec:\n  suspend: true\n"),
            "a suspended job has nothing to run; set it to false",
            id="suspended",
        ),
        pytest.param(
            ("spec:\n", "spec:\n  managedBy: a.b/c\n"), "another controller runs this job", id="of another controller"
        ),
        pytest.param(
            ("replicas: 3", "replicas: 0"),
            ":18: spec.worker.replicas: Input should be greater than or equal to 1 (got 0)",
            id="invalid",
        ),
    ],
)
def test_run_refuses_with_2_and_the_line(
    change: tuple[str, str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = Path(GOOD).read_text()
    assert change[0] in text
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(text.replace(*change))
    assert main(["run", "job.yaml"]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert said.err.startswith("job.yaml:")
    assert said.out == ""
    assert not Path(".disttrain").exists()


def test_run_takes_one_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "two.yaml"
    text = Path(GOOD).read_text()
    file.write_text(text + "---\n" + text.replace("name: command", "name: other"))
    assert main(["run", str(file)]) == 2
    assert "holds 2 jobs (command, other); a run takes one" in capsys.readouterr().err
