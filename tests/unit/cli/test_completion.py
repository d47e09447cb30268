"""`disttrain completion`: what bash offers is what the command knows; every shell that is here can read its script."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from disttrain.cli.completion import SHELLS, verbs_of
from disttrain.cli.main import main, make_parser


@pytest.fixture
def script(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", request.param]) == 0
    path = tmp_path / f"completion.{request.param}"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize("script", SHELLS, indirect=True)
def test_the_script_holds_every_verb_and_option(script: Path) -> None:
    text = script.read_text()
    for verb in verbs_of(make_parser()):
        assert verb.name.split()[-1] in text
        for option in verb.options:
            assert any(name.lstrip("-") in text for name in option.names)
    if shell := shutil.which(script.suffix[1:]):
        subprocess.run([shell, "-n", script], check=True)


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_bash_offers_verbs_options_values_runs_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / ".disttrain/runs/digits-1").mkdir(parents=True)
    (tmp_path / "job.yaml").touch()
    lines = {
        "re": "report resume",
        "plot dig": "digits-1",
        "history x -o ''": "table json csv",
        "history x --out": "--output",
        "data pa": "pack",
        "data pack --se": "--seed",
        "lint jo": "job.yaml",
        "submit --code .dis": ".disttrain",
        "completion z": "zsh",
    }
    asks = "".join(
        f'COMP_WORDS=(disttrain {line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _disttrain; echo "${{COMPREPLY[*]}}"\n'
        for line in lines
    )
    program = f"source {script}\n{asks}"
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(lines.values())
