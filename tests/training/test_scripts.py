"""A script that was written for torchrun runs as it is, also after a worker was lost."""

import signal
from pathlib import Path

import pytest

from disttrain.api.names import Role
from training.job import Job

TORCHRUN = """
import os, sys
import torch, torch.distributed as dist
from disttrain_trainer import session

def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert os.environ["LOCAL_RANK"] == "0" and world == int(os.environ["WORLD_SIZE"])
    total = int(sys.argv[1])
    for step in range(total):
        one = torch.ones(1)
        dist.all_reduce(one)
        assert one.item() == world
        session.report(step=step + 1, loss=1 / (step + 1), samples=8, total_steps=total)
        if os.path.exists("stop-when-this-exists"):
            break
    with open(f"done-{rank}-{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w"):
        pass
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""


def script(tmp_path: Path, text: str, *args: str, workers: int = 2, **options: float) -> Job:
    """A job of this script."""
    (tmp_path / "train.py").write_text(text)
    spec = {
        "strategy": {"type": "DataParallel"},
        "trainer": {"script": {"file": "train.py", "args": list(args)}},
        "worker": {"replicas": workers},
    }
    return Job(folder=tmp_path, spec=spec, **options)  # type: ignore[arg-type]


def test_a_torchrun_script_runs_unchanged_and_reports(tmp_path: Path) -> None:
    with script(tmp_path, TORCHRUN, "50") as job:
        job.start()
        assert job.supervise() == 0, job.logs()
        progress = job.termination(Role.MASTER).progress
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.world_size) == (50, 50, 2)
    assert progress.loss is not None
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0-1", "done-1-1"]


def test_a_killed_worker_starts_the_script_again_everywhere(tmp_path: Path) -> None:
    with script(tmp_path, TORCHRUN, "1000000") as job:
        job.start()
        job.until(lambda progress: progress.step > 20)
        job.kill(Role.WORKER, 1)
        assert job.wait(Role.WORKER, 1) == 137
        (tmp_path / "stop-when-this-exists").touch()
        job.start_one(Role.WORKER, 1)
        assert job.supervise() == 0, job.logs()
        assert job.restarts == {}
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0-2", "done-1-2"]


def test_the_first_failure_is_the_cause_and_the_others_wait(tmp_path: Path) -> None:
    failing = TORCHRUN.replace(
        "one = torch.ones(1)", "one = torch.ones(1)\n        if rank == 1 and step == 10: boom()"
    )
    with script(tmp_path, failing, "1000000") as job:
        job.start()
        assert job.wait(Role.WORKER, 1) == 1
        termination = job.termination(Role.WORKER, 1)
        assert termination.message.startswith("NameError: name 'boom' is not defined")
        assert termination.where == f"{tmp_path}/train.py:{failing[: failing.index('boom()')].count(chr(10)) + 1}"
        with pytest.raises(TimeoutError):
            job.wait(Role.WORKER, 0, timeout=2)


def test_sigterm_reaches_the_script_and_is_no_success(tmp_path: Path) -> None:
    text = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nopen('up', 'w')\nwhile True: signal.pause()\n"
    with script(tmp_path, text, workers=1) as job:
        job.start()
        job.until(lambda progress: progress.generation == 1 and (tmp_path / "up").exists())
        job.kill(Role.WORKER, 0, signal.SIGTERM)
        assert job.wait(Role.WORKER, 0, timeout=10) == 143


def test_a_script_dies_with_its_agent(tmp_path: Path) -> None:
    text = "import os, signal\nopen('pid', 'w').write(str(os.getpid()))\nos.rename('pid', 'pid-whole')\nwhile True: signal.pause()\n"
    with script(tmp_path, text, workers=1) as job:
        job.start()
        job.until(lambda _: (tmp_path / "pid-whole").exists())
        pid = int((tmp_path / "pid-whole").read_text())
        job.kill(Role.WORKER, 0)
        job.until(
            lambda _: not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text(),
            timeout=5,
            tolerate=True,
        )


def test_a_missing_script_is_named(tmp_path: Path) -> None:
    with script(tmp_path, "") as job:
        (tmp_path / "train.py").unlink()
        job.start()
        assert job.wait(Role.WORKER, 0) == 2
        assert "trainer.script.file: 'train.py' is not in" in job.termination(Role.WORKER, 0).message


def test_the_master_of_a_command_reports_until_it_is_told_to_end(tmp_path: Path) -> None:
    spec = {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["true"]}, "worker": {"replicas": 1}}
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        assert job.wait(Role.WORKER, 0) == 0
        job.until(lambda progress: progress.waiting_for is None)
        job.kill(Role.MASTER, 0, signal.SIGTERM)
        assert job.wait(Role.MASTER) == 0
