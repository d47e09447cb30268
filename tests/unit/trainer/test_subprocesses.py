"""The program itself, before it is a role."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from cluster.processes import wait_for
from disttrain.manifests.pod import ENTRYPOINT


def terminated(argv: list[str], folder: Path, *, once: str) -> int:
    """The exit code of a program that gets SIGTERM once it has made this file."""
    program = subprocess.Popen(argv, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)})
    try:
        wait_for(f"{once} to exist", (folder / once).exists, 30)
        program.send_signal(signal.SIGTERM)
        return program.wait(10)
    finally:
        program.kill()
        program.wait()


def test_sigterm_that_came_before_python_had_started_is_handled(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("open('starting', 'w').close()\nimport time\ntime.sleep(1)\n")
    argv = [*ENTRYPOINT[:2], sys.executable, "-m", "disttrain_trainer"]
    assert terminated(argv, tmp_path, once="starting") == 128 + signal.SIGTERM


def test_sigterm_is_handled_while_it_still_imports(tmp_path: Path) -> None:
    """As a container's first process it would otherwise be ignored, and the pod stay for its whole grace period."""
    (tmp_path / "argparse.py").write_text("open('importing', 'w').close()\nimport time\ntime.sleep(60)\n")
    argv = [sys.executable, "-m", "disttrain_trainer"]
    assert terminated(argv, tmp_path, once="importing") == 128 + signal.SIGTERM
