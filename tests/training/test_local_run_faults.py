"""`disttrain run` when processes are killed, one role after the other; when it is interrupted; and when it is killed itself."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from cluster.processes import wait_for
from disttrain.api.job import DistTrainJob
from disttrain.api.runtime import Termination
from local_runs.command import Started, left_behind, run

EVERY_STEPS = 50
pytestmark = pytest.mark.timeout(240)


def long_digits(folder: Path) -> str:
    """The example, long enough to be killed in the middle; with a factory of this folder's own that takes its time."""
    (folder / "slow.py").write_text(
        "import time\n"
        "from disttrain_trainer.examples import digits\n"
        "def loss(model, batch):\n"
        "    time.sleep(0.01)\n"
        "    return digits.loss(model, batch)\n"
    )
    job, claim = yaml.safe_load_all(Path("examples/digits-ps.yaml").read_text())
    job["spec"]["trainer"] |= {"loss": "slow:loss", "epochs": 20}
    job["spec"]["checkpoint"]["everySteps"] = EVERY_STEPS
    (folder / "job.yaml").write_text(yaml.safe_dump_all([job, claim]))
    return "job.yaml"


def checkpoint_of(folder: Path) -> bool:
    return any(folder.glob(".disttrain/claims/*/*/step-*/manifest.json"))


@pytest.mark.parametrize("victim", ["worker-1", "parameter-server-0", "master-0"])
def test_any_process_can_be_lost(tmp_path: Path, victim: str) -> None:
    started = Started(tmp_path, long_digits(tmp_path), "-o", "json")
    wait_for("a checkpoint", lambda: checkpoint_of(tmp_path), 90)
    os.kill(started.pid(victim), signal.SIGKILL)
    done = started.finish(120)
    assert done.code == 0, done
    status = DistTrainJob.parse(done.job).status
    assert status.is_true("Complete")
    assert status.attempt == 1
    assert status.restarts is not None
    assert status.restarts.total == 1, status.restarts
    assert status.restarts.last is not None
    assert (status.restarts.last.exit_code, status.restarts.last.reason) == (137, "Error")
    assert status.training is not None
    assert status.training.step == status.training.total_steps == 460
    assert float((status.training.evaluation or {})["accuracy"]) >= 0.97
    # At most one checkpoint interval is done again, and only when a server was lost: workers and the master keep no parameters.
    assert _redone_steps(started) <= (EVERY_STEPS if victim.startswith("parameter-server") else 0)
    assert left_behind(tmp_path) == []


def _redone_steps(started: Started) -> int:
    """What the last master said at its end."""
    words = sorted(
        (started.run_folder() / "last-words").glob("*-master-0-*.json"), key=lambda file: file.stat().st_mtime
    )
    progress = Termination.decode(words[-1].read_text()).progress
    assert progress is not None
    assert progress.finished
    return progress.redone_steps


def test_ctrl_c_ends_everything_and_resume_goes_on(tmp_path: Path) -> None:
    file = long_digits(tmp_path)
    started = Started(tmp_path, file)
    wait_for("a checkpoint", lambda: checkpoint_of(tmp_path), 90)
    started.process.send_signal(signal.SIGINT)
    done = started.finish(40)
    assert done.code == 130, done
    assert "--resume" in done.out
    assert left_behind(tmp_path) == []

    resumed = run(tmp_path, file, "--resume", "-o", "json", seconds=120)
    assert resumed.code == 0, resumed
    job = DistTrainJob.parse(resumed.job)
    assert job.status.attempt == 2
    assert job.status.training is not None
    assert job.status.training.step == 460
    assert "begins at step 0" not in resumed.err


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    started = Started(tmp_path, long_digits(tmp_path))
    started.pid("worker-0")
    time.sleep(0.2)
    began = time.monotonic()
    started.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    started.process.send_signal(signal.SIGINT)
    done = started.finish(20)
    assert done.code == 130, done
    assert time.monotonic() - began < 5
    assert left_behind(tmp_path) == []


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    started = Started(tmp_path, long_digits(tmp_path))
    for name in ("worker-0", "worker-1", "master-0", "parameter-server-0", "parameter-server-1"):
        started.pid(name)
    started.process.send_signal(signal.SIGKILL)
    started.process.communicate()
    wait_for("nothing to be left", lambda: not left_behind(tmp_path), 10)


def test_two_runs_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    job = yaml.safe_load(Path("examples/mlp-sync.yaml").read_text())
    job["spec"]["worker"]["replicas"] = 1
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    both = [Started(tmp_path, "job.yaml", "-o", "json") for _ in range(2)]
    uids = set()
    for started in both:
        done = started.finish(150)
        assert done.code == 0, done
        uids.add(done.job["metadata"]["uid"])
    assert len(uids) == 2
