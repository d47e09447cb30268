"""The program itself, before it is a role."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from cluster.processes import wait_for
from disttrain.manifests.pod import ENTRYPOINT


def test_sigterm_that_came_before_python_had_started_is_handled(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("open('starting', 'w').close()\nimport time\ntime.sleep(1)\n")
    argv = [*ENTRYPOINT[:2], sys.executable, "-m", "disttrain_trainer"]
    program = subprocess.Popen(argv, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    try:
        wait_for("Python to start", (tmp_path / "starting").exists, 30)
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 128 + signal.SIGTERM
    finally:
        program.kill()
        program.wait()


def test_sigterm_is_handled_while_it_still_imports(tmp_path: Path) -> None:
    """As a container's first process it would otherwise be ignored, and the pod stay for its whole grace period."""
    (tmp_path / "argparse.py").write_text("open('importing', 'w').close()\nimport time\ntime.sleep(60)\n")
    program = subprocess.Popen(
        [sys.executable, "-m", "disttrain_trainer"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    try:
        wait_for("it to import", (tmp_path / "importing").exists, 30)
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 128 + signal.SIGTERM
    finally:
        program.kill()
        program.wait()
