"""`disttrain run` when processes are killed, one role after the other; when it is interrupted; and when it is killed itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml

from cluster.processes import wait_for
from disttrain.api.job import DistTrainJob
from disttrain.api.status import DistTrainJobStatus
from disttrain.api.termination import Termination
from local_runs.command import Finished, Started, left_behind, run
from width import WIDE

EVERY_STEPS = 50
pytestmark = pytest.mark.timeout(300)


def long_digits(folder: Path, example: str = "digits-ps") -> str:
    """An example, long enough to be killed in the middle; with a factory of this folder's own that takes its time."""
    (folder / "slow.py").write_text(
        "import time\n"
        "from disttrain_trainer.examples import digits\n"
        "def loss(model, batch):\n"
        "    time.sleep(0.01)\n"
        "    return digits.loss(model, batch)\n"
    )
    job, claim = yaml.safe_load_all(Path(f"examples/{example}.yaml").read_text())
    job["spec"]["trainer"] |= {"loss": "slow:loss", "epochs": 20}
    job["spec"]["checkpoint"]["everySteps"] = EVERY_STEPS
    (folder / "job.yaml").write_text(yaml.safe_dump_all([job, claim]))
    return "job.yaml"


def checkpoint_of(folder: Path) -> bool:
    return any(folder.glob(".disttrain/claims/*/*/step-*/manifest.json"))


def lost_once(done: Finished, *, attempt: int = 1) -> DistTrainJobStatus:
    """The status of a job that completed although one of its processes was killed."""
    assert done.code == 0, done
    status = DistTrainJob.parse(done.job).status
    assert status.is_true("Complete")
    assert status.attempt == attempt
    assert status.restarts is not None
    assert status.restarts.total == 1, status.restarts
    assert status.restarts.last is not None
    assert (status.restarts.last.exit_code, status.restarts.last.reason) == (137, "Error")
    return status


VICTIMS = [
    ("digits-ps", "worker-0"),
    ("digits-ps", "parameter-server-1"),
    ("digits-ps", "master-0"),
    ("digits-ddp", "worker-0"),
]
if WIDE:  # twenty seconds each, and their twins are above
    VICTIMS += [("digits-ps", "worker-1"), ("digits-ps", "parameter-server-0"), ("digits-ddp", "worker-1")]
    VICTIMS += [("digits-ddp", "master-0")]


@pytest.mark.parametrize(("example", "victim"), VICTIMS)
def test_any_process_can_be_lost(tmp_path: Path, example: str, victim: str) -> None:
    started = Started(tmp_path, long_digits(tmp_path, example), "-o", "json")
    wait_for("a checkpoint", lambda: checkpoint_of(tmp_path), 120)
    os.kill(started.pid(victim), signal.SIGKILL)
    status = lost_once(started.finish(120))
    assert status.training is not None
    assert status.training.step == status.training.total_steps == 460
    assert float((status.training.evaluation or {})["accuracy"]) >= 0.97
    # At most one checkpoint interval is done again, and only when a server was lost: workers and the master keep no parameters.
    # Of data parallel workers each has them all.
    assert _redone_steps(started) <= (EVERY_STEPS if victim.startswith("parameter-server") else 0)
    assert left_behind(tmp_path) == []


INNER = [("digits-ps", "worker-1"), ("digits-ps", "parameter-server-0"), ("digits-ddp", "worker-1")]


@pytest.mark.parametrize(("example", "victim"), INNER if WIDE else INNER[1:])
def test_a_lost_process_is_restarted_in_place_and_counted_once(tmp_path: Path, example: str, victim: str) -> None:
    started = Started(tmp_path, long_digits(tmp_path, example), "-o", "json")
    wait_for("a checkpoint", lambda: checkpoint_of(tmp_path), 120)
    launcher = started.pid(victim)
    os.kill(started.inner_pid(victim), signal.SIGKILL)
    pod = victim.replace("parameter-server", "ps")
    wait_for("its successor", lambda: "it is started again in this pod at once" in started.log(f"{example}-{pod}"), 20)
    assert started.pid(victim) == launcher
    done = started.finish(120)
    status = lost_once(done)
    assert status.training is not None
    assert status.training.step == status.training.total_steps == 460
    assert _redone_steps(started) <= (EVERY_STEPS if victim.startswith("parameter-server") else 0)
    role = "ParameterServer" if victim.startswith("parameter-server") else "Worker"
    assert {one.role: one.restarts for one in status.replica_statuses if one.restarts} == {role: 1}
    assert status.restarts is not None
    assert status.restarts.last is not None
    assert status.restarts.last.message.startswith("killed by SIGKILL at step ")
    assert done.err.count("it was started again in the pod") == 1
    assert left_behind(tmp_path) == []


def test_a_worker_of_a_script_can_be_lost(tmp_path: Path) -> None:
    """Its programs know no checkpoints: all of them start again in a new round."""
    job, config = yaml.safe_load_all(Path("examples/torchrun-script.yaml").read_text())
    slow = config["data"]["train.py"].replace("    optimizer.step()\n", "    optimizer.step(); time.sleep(0.01)\n")
    config["data"]["train.py"] = "import time\n" + slow
    (tmp_path / "job.yaml").write_text(yaml.safe_dump_all([job, config]))
    started = Started(tmp_path, "job.yaml", "-o", "json")
    wait_for("a step", lambda: "step 50 of 200" in started.log("torchrun-script-worker-0"), 120)
    os.kill(started.pid("worker-1"), signal.SIGKILL)
    done = started.finish(120)
    lost_once(done)
    assert "step 200 of 200 on 2 ranks" in done.err
    assert left_behind(tmp_path) == []


def test_a_worker_of_a_command_can_be_lost(tmp_path: Path) -> None:
    """No agent could start its peers in a new round: the operator starts all of them again, as the next attempt."""
    job = yaml.safe_load(Path("examples/command.yaml").read_text())
    job["spec"]["trainer"]["command"] = ["sh", "-c", "echo up; while [ ! -e go ]; do sleep 0.1; done"]
    job["spec"]["worker"]["replicas"] = 2
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    started = Started(tmp_path, "job.yaml", "-o", "json")
    wait_for("both workers", lambda: all("up" in started.log(f"command-worker-{n}") for n in (0, 1)), 60)
    os.kill(started.pid("worker-1"), signal.SIGKILL)
    wait_for("its successor", lambda: started.log("command-worker-1").count("up") == 2, 60)
    (tmp_path / "go").touch()
    lost_once(started.finish(60), attempt=2)
    assert left_behind(tmp_path) == []


def _redone_steps(started: Started) -> int:
    """What the last master said at its end."""
    words = sorted(
        (started.run_folder() / "termination").glob("*-master-0-*.json"), key=lambda file: file.stat().st_mtime
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
    """The first lets a program of its own have its time; the test sees that it received the signal and uses that time before the second."""
    job = yaml.safe_load(Path("examples/command.yaml").read_text())
    says = "lambda *_: os.write(1, b'signalled\\n')"
    stubborn = f"import os, signal, time; signal.signal(15, {says}); print('up', flush=True); time.sleep(100)"
    job["spec"]["trainer"]["command"] = ["python", "-c", stubborn]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    started = Started(tmp_path, "job.yaml")
    wait_for("the workers", lambda: all("up" in started.log(f"command-worker-{n}") for n in range(3)), 60)
    started.process.send_signal(signal.SIGINT)
    wait_for("the signal", lambda: all("signalled" in started.log(f"command-worker-{n}") for n in range(3)), 20)
    assert started.process.poll() is None
    started.process.send_signal(signal.SIGINT)
    done = started.finish(20)
    assert done.code == 130, done
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
