"""A script that was written for torchrun runs as it is, also after a worker was lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.processes import start_time, wait_for
from disttrain.api import environment
from disttrain.api.names import Role
from training.job import Job

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchrun-script.yaml"
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
        if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "1":
            break
    with open(f"done-{rank}-{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w"):
        pass
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""


def script(tmp_path: Path, text: str, *args: str, workers: int = 2, processes: int = 1, **options: float) -> Job:
    """A job of this script, with so many processes in each pod."""
    (tmp_path / "train.py").write_text(text)
    spec = {
        "strategy": {"type": "DataParallel"},
        "trainer": {"script": {"file": "train.py", "args": list(args)}},
        "worker": {"replicas": workers},
    }
    job = Job(folder=tmp_path, spec=spec, **options)  # type: ignore[arg-type]
    job.config = job.config.model_copy(update={"processes_per_worker": processes})
    return job


def test_a_torchrun_script_runs_unchanged_and_reports(tmp_path: Path) -> None:
    with script(tmp_path, TORCHRUN, "50") as job:
        progress = job.train()
    assert (progress.step, progress.total_steps, progress.world_size) == (50, 50, 2)
    assert progress.loss is not None
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0-0", "done-1-0"]


def test_a_killed_worker_starts_the_script_again_everywhere(tmp_path: Path) -> None:
    with script(tmp_path, TORCHRUN, "1000000") as job:
        job.start()
        job.until(lambda progress: progress.step > 20)
        job.kill(Role.WORKER, 1)
        assert job.wait(Role.WORKER, 1) == 137
        job.start_one(Role.WORKER, 1)
        job.complete()
        assert job.restarts == {}
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0-1", "done-1-1"]


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
        wait_for("the script to be gone", lambda: start_time(pid) is None, 5)


def test_a_missing_script_is_named(tmp_path: Path) -> None:
    with script(tmp_path, "") as job:
        (tmp_path / "train.py").unlink()
        job.start()
        assert job.wait(Role.WORKER, 0) == 2
        assert "trainer.script.file: 'train.py' is not in" in job.termination(Role.WORKER, 0).message


CONTRACT = """
import json, os, sys
names = sorted(n for n in os.environ if n.startswith(("GROUP_", "LOCAL_", "ROLE_", "TORCHELASTIC_")) or n in ("RANK", "WORLD_SIZE"))
with open(f"env-{os.environ['RANK']}", "w") as file:
    json.dump({name: os.environ[name] for name in names}, file)
"""


def test_a_pod_of_two_processes_has_the_environment_of_torchruns_nodes(tmp_path: Path) -> None:
    with script(tmp_path, CONTRACT, processes=2) as job:
        job.train()
        uid = job.config.uid
    for rank in range(4):
        found = json.loads((tmp_path / f"env-{rank}").read_text())
        assert found == {
            "RANK": str(rank),
            "WORLD_SIZE": "4",
            "LOCAL_RANK": str(rank % 2),
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": str(rank // 2),
            "GROUP_WORLD_SIZE": "2",
            "ROLE_NAME": "default",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": "4",
            "TORCHELASTIC_MAX_RESTARTS": "999",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_RUN_ID": uid,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }


EXITS = """
import atexit, os, pathlib, time
import torch, torch.distributed as dist

class Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient, async_op=True)
        return gradient

dist.init_process_group("gloo")
rank, ends = dist.get_rank(), pathlib.Path("ends")
while rank == 1 and not ends.exists():
    time.sleep(0.01)
time.sleep(0.3 * rank)
Reduced.apply(torch.ones(5, requires_grad=True)).sum().backward()
if rank == 0:
    ends.touch()
    atexit.register(sum, range(10**8))  # keeps Python's lock, in which gloo's thread comes to ask for it
else:
    time.sleep(1)
    os._exit(0)
"""


def test_a_thread_of_torch_that_is_still_at_work_when_a_script_ends_does_not_abort_it(tmp_path: Path) -> None:
    with script(tmp_path, EXITS) as job:
        job.train()
        assert job.termination(Role.MASTER).progress.generation == 1  # type: ignore[union-attr]


def test_the_example_prints_the_same_lines_under_torchrun(tmp_path: Path) -> None:
    (document,) = [d for d in yaml.safe_load_all(EXAMPLE.read_text()) if d["kind"] == "ConfigMap"]
    text = document["data"]["train.py"]
    with script(tmp_path, text, "--steps", "100") as job:
        job.train()
        printed = [
            line for index in range(2) for line in job.log(Role.WORKER, index).splitlines() if line.startswith("step ")
        ]
    # Under Python itself torch may abort when all is done (pytorch#190489), and torchrun ends the other rank for it.
    (tmp_path / "whole.py").write_text("import os, runpy; runpy.run_path('train.py', run_name='__main__'); os._exit(0)")
    torchrun = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "whole.py",
            "--steps",
            "100",
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert torchrun.returncode == 0, torchrun.stderr
    assert [line for line in torchrun.stdout.splitlines() if line.startswith("step ")] == printed
    assert len(printed) == 2


def test_a_command_that_makes_its_own_process_group_completes(tmp_path: Path) -> None:
    # A command has no LOCAL_RANK: a launcher, such as torchrun's, would make it.
    text = TORCHRUN.replace("os.environ['TORCHELASTIC_RESTART_COUNT']", "0")
    text = text.replace("""os.environ["LOCAL_RANK"] == "0" and """, "")
    (tmp_path / "train.py").write_text(text)
    spec = {
        "strategy": {"type": "DataParallel"},
        "trainer": {"command": [sys.executable, "train.py", "20"]},
        "worker": {"replicas": 2},
    }
    with Commanded(folder=tmp_path, spec=spec) as job:
        job.start()
        assert [job.wait(Role.WORKER, index) for index in range(2)] == [0, 0], job.logs()
        assert job.until(lambda progress: progress.step == 20).total_steps == 20
        job.kill(Role.MASTER, 0, signal.SIGTERM)
        assert job.wait(Role.MASTER) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0-0", "done-1-0"]


class Commanded(Job):
    """A command has no agent: the variables of torchrun are those of the pod."""

    def environment(self, role: Role, index: int) -> dict[str, str]:
        host, port = self.config.addresses.rendezvous.split(":")
        return super().environment(role, index) | {
            environment.MASTER_ADDR: host,
            environment.MASTER_PORT: port,
            environment.RANK: str(index),
            environment.WORLD_SIZE: str(self.config.workers),
        }


def test_the_master_of_a_command_reports_until_sigterm_and_does_not_say_that_it_is_done(tmp_path: Path) -> None:
    spec = {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["true"]}, "worker": {"replicas": 1}}
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        assert job.wait(Role.WORKER, 0) == 0
        job.until(lambda progress: progress.waiting_for is None)
        job.kill(Role.MASTER, 0, signal.SIGTERM)
        assert job.wait(Role.MASTER) == 128 + signal.SIGTERM
