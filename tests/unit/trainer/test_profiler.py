"""DISTTRAIN_PROFILE: which steps are traced, and where the trace lies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from disttrain.api import environment
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.loop.profiler import Profiler


def test_the_steps_that_the_environment_names_are_in_a_chrome_trace(tmp_path: Path) -> None:
    environ = {environment.PROFILE: "1:3", environment.CHECKPOINT_DIR: str(tmp_path)}
    profiler = Profiler.of(environ, name="worker-0")
    assert profiler is not None
    for step in range(5):
        profiler.before_step(step)
        torch.ones(step + 1).cumsum(0)
    (file,) = tmp_path.iterdir()
    assert file.name == "profile-worker-0-1-3.json"
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("aten::cumsum") == 2


def test_without_the_variable_nothing_is_traced() -> None:
    assert Profiler.of({}, name="worker-0") is None


@pytest.mark.parametrize("asked", ["10", "5:5", "15:10", "0:1001", "a:b", "-1:3"])
def test_other_values_are_refused(asked: str) -> None:
    with pytest.raises(WrongInput, match=r"DISTTRAIN_PROFILE: .* names no steps; expected .* 10:15"):
        Profiler.of({environment.PROFILE: asked}, name="worker-0")


SCRIPT = """
import torch
from disttrain_trainer import session

for step in range(5):
    session.profile(step)
    torch.ones(step + 1).cumsum(0)
"""


@pytest.mark.parametrize(("asked", "traced"), [("1:3", 2), ("3:9", 2), ("", 0)])
def test_a_script_says_where_its_steps_begin(tmp_path: Path, asked: str, traced: int) -> None:
    environ = {environment.PROFILE: asked, environment.RANK: "4", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environ, check=True)
    files = [*tmp_path.iterdir()]
    assert [file.name for file in files] == [f"profile-worker-4-{asked.replace(':', '-')}.json"] * bool(asked)
    for file in files:
        names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
        assert names.count("aten::cumsum") == traced


def test_a_script_with_another_value_ends_by_one_line(tmp_path: Path) -> None:
    environ = {environment.PROFILE: "all", "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("DISTTRAIN_PROFILE: 'all' names no steps")
    assert ended.stderr.count("\n") == 1
