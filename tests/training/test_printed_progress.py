"""Programs that know nothing of us have progress: by what they print, or by what they report to Kubeflow's Trainer."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.processes import wait_for
from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role
from disttrain.api.status import TrainingStatus
from local_runs.command import Finished, run
from training.job import Job

PATTERN = "step (?P<step>[0-9]+)/(?P<total>[0-9]+).*loss (?P<loss>[0-9.e-]+)"
PRINTS = r"""
import os, sys, time
first, last = 1, 30
if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and len(sys.argv) > 1:
    last = 20
for step in range(first, last + 1):
    # As a progress bar writes, whose line ends with the next state; and some bytes that are no text.
    os.write(2 if step % 2 else 1, f"\r{step:3}%|## step {step}/30 loss 0.25 \xff".encode("latin-1"))
    time.sleep(0.02)
os.write(1, b"\r")
os.write(2, b"\r")
while last == 20:
    time.sleep(1)
os.write(1, b"\nthe last words\n")
"""
POSTS = r"""
import json, os, urllib.request
import torch.distributed as dist
dist.init_process_group("gloo")
url, token = os.environ["KUBEFLOW_TRAINER_SERVER_URL"], open(os.environ["KUBEFLOW_TRAINER_SERVER_TOKEN"]).read().strip()
if dist.get_rank() == 0:
    for step, loss in ((10, 0.5), (40, 0.25)):
        metrics = {"current_step": step, "total_steps": 40, "loss": loss}
        status = {"progressPercentage": step, "metrics": [{"name": n, "value": str(v)} for n, v in metrics.items()]}
        body = json.dumps({"trainerStatus": status}).encode()
        request = urllib.request.Request(url, data=body, method="POST", headers={"Authorization": f"Bearer {token}"})
        urllib.request.urlopen(request, timeout=20).close()
dist.destroy_process_group()
"""


def ran(folder: Path, program: str, trainer: dict[str, Any]) -> tuple[Finished, TrainingStatus | None]:
    (folder / "train.py").write_text(program)
    spec = {"strategy": {"type": "DataParallel"}, "trainer": trainer, "worker": {"replicas": 2}}
    job = {"apiVersion": "disttrain.dev/v1alpha1", "kind": "DistTrainJob", "metadata": {"name": "prints"}, "spec": spec}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    done = run(folder, "job.yaml", "-o", "json", seconds=150)
    assert done.code == 0, done
    return done, DistTrainJob.parse(done.job).status.training


@pytest.mark.timeout(180)
def test_what_a_command_prints_is_its_progress(tmp_path: Path) -> None:
    trainer = {"command": ["python", "train.py"], "progress": {"pattern": PATTERN}}
    done, training = ran(tmp_path, PRINTS, trainer)
    assert training is not None
    assert (training.step, training.total_steps, training.progress_percent) == (30, 30, 100)
    assert training.loss == 0.25
    assert done.err.count("the last words") == 2


def test_a_script_that_starts_again_goes_on_from_the_step_that_it_prints(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PRINTS)
    trainer = {"script": {"file": "train.py", "args": ["waits"]}, "progress": {"pattern": PATTERN}}
    spec = {"strategy": {"type": "DataParallel"}, "trainer": trainer, "worker": {"replicas": 2}}
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        job.until(lambda progress: progress.step == 20)
        job.kill(Role.WORKER, 1, signal.SIGKILL)
        assert job.wait(Role.WORKER, 1) == 137
        job.start_one(Role.WORKER, 1)
        progress = job.complete()
    assert (progress.step, progress.total_steps) == (30, 30)
    assert progress.redone_steps >= 19 - 1


@pytest.mark.timeout(180)
def test_reports_to_kubeflows_trainer_reach_the_status(tmp_path: Path) -> None:
    _, training = ran(tmp_path, POSTS, {"script": {"file": "train.py"}})
    assert training is not None
    assert (training.step, training.total_steps, training.loss) == (40, 40, 0.25)


def test_sigterm_reaches_a_command_whose_output_is_read(tmp_path: Path) -> None:
    """Its own end is the container's: a program that saves its state and ends with 3 has ended with 3."""
    text = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\nopen('up', 'w')\nwhile True: signal.pause()\n"
    (tmp_path / "train.py").write_text(text)
    spec = {"command": ["python", "train.py"], "progress": {"pattern": "(?P<step>[0-9]+)"}}
    with Job(
        folder=tmp_path, spec={"strategy": {"type": "DataParallel"}, "trainer": spec, "worker": {"replicas": 1}}
    ) as job:
        job.start_one(Role.WORKER, 0)
        wait_for("the program", (tmp_path / "up").exists, 60)
        job.kill(Role.WORKER, 0, signal.SIGTERM)
        assert job.wait(Role.WORKER, 0) == 3


@pytest.mark.timeout(180)
def test_a_command_whose_output_is_read_ends_as_it_would_alone(tmp_path: Path) -> None:
    """A program that does not exist, and one that raises."""
    (tmp_path / "train.py").write_text("raise ValueError('no data')")
    for command, code, message in (
        (["python", "train.py"], 1, "ValueError: no data"),
        (["pithon"], 127, "trainer.command: there is no program 'pithon'"),
    ):
        spec = {"command": command, "progress": {"pattern": "(?P<step>[0-9]+)"}}
        job = Job(
            folder=tmp_path, spec={"strategy": {"type": "DataParallel"}, "trainer": spec, "worker": {"replicas": 1}}
        )
        with job:
            job.start_one(Role.WORKER, 0)
            assert job.wait(Role.WORKER, 0) == code
            assert job.termination(Role.WORKER, 0).message == message
