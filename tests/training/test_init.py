"""The job of `disttrain init` trains as it is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_new_job_trains(tmp_path: Path) -> None:
    disttrain = Path(sys.executable).with_name("disttrain")
    for arguments in (("init", "mine", "--workers", "1"), ("run", "-q", "-o", "json", "mine.yaml")):
        done = subprocess.run(
            [disttrain, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False
        )
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"]["training"]["evaluation"]["accuracy"] > 0.9
