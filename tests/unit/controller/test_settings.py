"""Settings from flags and environment; wrong ones are said in one line, with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.controller.settings import Settings, flag, variable


def test_flag_goes_before_environment_before_default() -> None:
    environment = {"DISTTRAIN_OPERATOR_WORKERS": "3", "DISTTRAIN_OPERATOR_PORT": "9999"}
    settings = Settings.load(["--port=0", "--leader-elect", "--namespaces=a,b"], environment)
    assert (settings.workers, settings.port, settings.leader_elect) == (3, 0, True)
    assert settings.namespaces == ("a", "b")
    assert settings.resync_seconds == Settings().resync_seconds


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        pytest.param(["--workers=many"], {}, id="no number"),
        pytest.param([], {"DISTTRAIN_OPERATOR_WORKERS": "0"}, id="out of range, in the environment"),
    ],
)
def test_wrong_value_is_one_line_that_names_it(
    arguments: list[str], environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        Settings.load(arguments, environment)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flag("workers") in line
    assert variable("workers") in line


def test_every_setting_is_explained() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_operator_is_imported_without_torch_and_without_typed_models() -> None:
    code = "import sys, disttrain.controller.process; print(len([m for m in sys.modules if m.startswith('torch')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_without_a_cluster_it_says_so_in_one_line() -> None:
    program = Path(sys.executable).with_name("disttrain-operator")
    done = subprocess.run(
        [program, "--port=0"], capture_output=True, text=True, env={"KUBECONFIG": "/nonexistent"}, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "KUBECONFIG" in line
