"""The example of the guide for users, as a reader copies it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path("docs/guide/your-own-model.md").read_text()


def test_the_example_of_the_guide_is_clean_and_trains(tmp_path: Path) -> None:
    blocks = dict(re.findall(r"^```\w+\n# (spiral\.\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
    assert set(blocks) == {"spiral.py", "spiral.yaml"}
    for name, text in blocks.items():
        (tmp_path / name).write_text(text)
    disttrain = [str(Path(sys.executable).with_name("disttrain"))]
    lint = subprocess.run([*disttrain, "lint", "spiral.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert lint.returncode == 0, lint.stdout + lint.stderr
    run = subprocess.run(
        [*disttrain, "run", "-q", "-o", "json", "spiral.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    training = json.loads(run.stdout)["status"]["training"]
    assert float(training["evaluation"]["accuracy"]) > 0.95
    (loads,) = re.findall(r"^```python\n(from safetensors.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    program = loads.replace("model.safetensors", training["model"]["path"])
    (evaluates,) = re.findall(r"^`(evaluate\(trained.*)` then gives", PAGE, re.MULTILINE)
    program += f"from spiral import dataset, evaluate\nprint({evaluates}['accuracy'])"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert loaded.returncode == 0, loaded.stderr
    assert float(loaded.stdout) == pytest.approx(training["evaluation"]["accuracy"], rel=1e-4)


def test_the_commands_of_the_page_on_packed_data_pack_and_train(tmp_path: Path) -> None:
    page = Path("docs/guide/packed-data.md").read_text()
    (job,) = re.findall(r"^```yaml\n(# digits\.yaml\n.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "digits.yaml").write_text(job)
    consoles = re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    commands = [line.removeprefix("$ ") for block in consoles for line in block.splitlines() if "kubectl" not in line]
    assert [re.split(r"[ -]", command)[0] for command in commands] == ["openssl", "disttrain", "printf", "disttrain"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.findall(r"^  evaluation +accuracy ([0-9.]+)$", done.stdout, re.M)[0]) > 0.9
    (log,) = tmp_path.glob(".disttrain/runs/*/logs/*worker-0*")
    assert "copies of " in log.read_text()
