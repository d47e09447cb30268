"""Runs a program of the suite under torchrun, as a script and as a command, and reads what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from disttrain.api.job import DistTrainJob
from disttrain.api.status import DistTrainJobStatus
from local_runs.command import run

PROGRAMS = Path(__file__).parent / "programs"
PACKAGES = Path(sys.executable).parents[1] / "clients"
"""Where tools/environment puts what requirements/clients.txt locks: on top of the environment of the tests, which has torch."""
SECONDS = 300

Result = dict[str, float]


def environment(**variables: str) -> dict[str, str]:
    """With the packages of the clients, and quick to compute on a few cores."""
    path = os.pathsep.join(filter(None, (str(PACKAGES), os.environ.get("PYTHONPATH"))))
    programs = f"{Path(sys.executable).parent}{os.pathsep}{PACKAGES / 'bin'}{os.pathsep}{os.environ['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {"PYTHONPATH": path, "PATH": programs, "OMP_NUM_THREADS": "1", **offline, **variables}


def alone(folder: Path, *words: str, **variables: str) -> Result:
    """The result of a program without DistTrain."""
    _put(folder)
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **environment(**variables)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return _result(done.stdout)


def under_disttrain(
    folder: Path, trainer: dict[str, Any], worker: dict[str, Any], **variables: str
) -> tuple[Result, DistTrainJobStatus]:
    """The result of a program in a job, and the job's status."""
    _put(folder)
    template = {
        "spec": {"containers": [{"name": "trainer", "env": [{"name": n, "value": v} for n, v in variables.items()]}]}
    }
    spec = {"strategy": {"type": "DataParallel"}, "trainer": trainer, "worker": {**worker, "template": template}}
    job = {"apiVersion": "disttrain.dev/v1alpha1", "kind": "DistTrainJob", "metadata": {"name": "client"}, "spec": spec}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    done = run(folder, "job.yaml", "-o", "json", environment=environment(), seconds=SECONDS)
    assert done.code == 0, done
    return _result(done.err), DistTrainJob.parse(done.job).status


def _put(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(PROGRAMS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def _result(output: str) -> Result:
    (said,) = re.findall(r"RESULT (\{.*\})$", output, re.M)
    result: Result = json.loads(said)
    return result
