"""A training process that is lost is forked again by its pod's launcher: the job goes on, and the master says how often that was."""

import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import wait_for
from disttrain.api.names import Role
from disttrain.api.runtime import Progress, RestartsInPlace
from training.job import Job, checkpoints, digits, held, served

SAVE_STEPS = 40
MIDDLE = 2 * SAVE_STEPS + 10
ENDLESS = {"epochs": 100_000, "evaluate": None}
SERVED = served("Sync")


def of(progress: Progress | None, role: Role, index: int) -> RestartsInPlace | None:
    assert progress is not None
    return next((one for one in progress.restarts_in_place if one.pod.startswith(f"{role.value}-{index}.")), None)


@pytest.mark.parametrize(
    ("changes", "role", "redone"),
    [
        pytest.param({}, Role.WORKER, 0, id="a rank of DataParallel"),
        pytest.param(SERVED, Role.WORKER, 0, id="a worker of parameter servers"),
        pytest.param(SERVED, Role.PARAMETER_SERVER, SAVE_STEPS, id="a parameter server"),
    ],
)
def test_a_killed_process_comes_back_in_its_pod(
    tmp_path: Path, changes: dict[str, Any], role: Role, redone: int
) -> None:
    spec = digits(**changes, **checkpoints(SAVE_STEPS), trainer=held(epochs=8))
    with Job(folder=tmp_path, spec=spec, in_place=True) as job:
        job.hold(MIDDLE)
        job.start()
        job.until(lambda p: p.last_checkpoint is not None and p.last_checkpoint.step >= MIDDLE - SAVE_STEPS)
        launcher = job.processes[role, 1].pid
        job.kill_inner(role, 1)
        progress_then = job.until(lambda p: of(p, role, 1) is not None)
        job.let_go()
        progress = job.complete()
        said = job.termination(role, 1)
    assert job.restarts == {}
    assert launcher == job.processes[role, 1].pid
    assert (progress.step, progress.finished) == (8 * 23, True)
    assert progress.redone_steps <= redone
    counted = of(progress_then, role, 1)
    assert counted is not None
    assert (counted.restarts, counted.failures, counted.exit_code) == (1, 1, 137)
    assert counted.message.startswith("killed by SIGKILL at step ")
    assert (said.done, said.restarts_in_place) == (True, counted), "the pod's own termination message says the same"
    assert progress.restarts_in_place == (counted,)


def test_a_master_that_is_replaced_learns_of_them_again(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(**SERVED, trainer=ENDLESS), in_place=True) as job:
        job.start()
        job.until(lambda p: p.step > 5)
        job.kill_inner(Role.WORKER, 0)
        before = job.until(lambda p: of(p, Role.WORKER, 0) is not None)
        job.kill(Role.MASTER)
        job.wait(Role.MASTER)
        job.start_one(Role.MASTER)
        after = job.until(lambda p: of(p, Role.WORKER, 0) is not None)
        assert after.restarts_in_place == before.restarts_in_place


CRASH = """
import os, signal
from disttrain_trainer.examples import digits

calls = 0

def loss(model, batch):
    global calls
    calls += 1
    if calls > {step} and os.environ["RANK"] == "1":
        {how}
    return digits.loss(model, batch)
"""


def crashing(folder: Path, how: str, *, step: int = 0, **spec: Any) -> Job:
    (folder / "crash.py").write_text(CRASH.format(how=how, step=step))
    return Job(folder=folder, spec=digits(trainer=ENDLESS | {"loss": "crash:loss"}, **spec), in_place=True)


def test_a_crash_that_repeats_itself_ends_the_pod_and_says_so(tmp_path: Path) -> None:
    with crashing(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)") as job:
        job.start()
        assert job.wait(Role.WORKER, 1, timeout=60) == 139
        said = job.termination(Role.WORKER, 1)
    assert said.message == "the process was killed by SIGSEGV before its first step, 3 times in a row"
    assert said.restarts_in_place is not None
    assert (said.restarts_in_place.restarts, said.restarts_in_place.failures) == (2, 2)


@pytest.mark.parametrize(("how", "code"), [("raise ValueError('mine')", 1), ("os._exit(3)", 3)])
def test_an_exit_code_of_the_users_ends_the_pod(tmp_path: Path, how: str, code: int) -> None:
    with crashing(tmp_path, how) as job:
        job.start()
        assert job.wait(Role.WORKER, 1, timeout=60) == code
        said = job.termination(Role.WORKER, 1)
    assert said.message == ("ValueError: mine" if code == 1 else "")
    assert said.where == (f"{tmp_path}/crash.py:11" if code == 1 else "")
    assert said.restarts_in_place is None


def test_a_code_that_the_failure_policy_names_ends_the_pod(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(trainer=ENDLESS), in_place=True) as job:
        job.config = job.config.model_copy(update={"exit_codes_of_rules": (137,)})
        job.start()
        job.until(lambda p: p.step > 5)
        job.kill_inner(Role.WORKER, 1)
        assert job.wait(Role.WORKER, 1) == 137
        assert not job.processes[Role.WORKER, 1].termination.exists(), "the end of the log says most"


MEMORY = """
from pathlib import Path
from disttrain_trainer.runtime import machine

real = machine.oom_kills
machine.oom_kills = lambda: real(Path("cgroup"), Path("cgroup/own"))
"""


def test_a_process_that_the_memory_limit_killed_ends_the_pod(tmp_path: Path) -> None:
    (tmp_path / "fault.py").write_text(MEMORY)
    events = tmp_path / "cgroup" / "pod" / "memory.events"
    events.parent.mkdir(parents=True)
    (tmp_path / "cgroup" / "own").write_text("0::/pod\n")
    events.write_text("low 0\nhigh 0\nmax 7\noom 0\noom_kill 0\n")
    with Job(folder=tmp_path, spec=digits(trainer=ENDLESS), in_place=True) as job:
        job.start()
        job.until(lambda p: p.step > 5)
        job.kill_inner(Role.WORKER, 1)
        job.until(lambda p: of(p, Role.WORKER, 1) is not None)  # not the memory limit: it comes back
        events.write_text("low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\n")
        job.kill_inner(Role.WORKER, 1)
        assert job.wait(Role.WORKER, 1) == 137
        assert job.termination(Role.WORKER, 1).message.startswith("the process was killed by the memory limit ")


def test_a_rank_without_its_master_ends_and_comes_back_in_its_pod(tmp_path: Path) -> None:
    spec = digits(**SERVED, trainer=ENDLESS)
    with Job(folder=tmp_path, spec=spec, in_place=True, peer_timeout=3, startup_timeout=4) as job:
        job.start()
        job.until(lambda p: p.step > 5)
        job.kill(Role.MASTER)
        job.wait(Role.MASTER)
        wait_for("it to give the master up", lambda: "ended with exit code 75" in job.log(Role.WORKER, 0), 60)
        job.start_one(Role.MASTER)
        progress_then = job.until(lambda p: p.step > 5 and of(p, Role.WORKER, 0) is not None, tolerate=True)
        counted = of(progress_then, Role.WORKER, 0)
        assert counted is not None
        assert (counted.failures, counted.exit_code) == (0, 75)


def test_a_frozen_process_stays_frozen(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(**SERVED, trainer=ENDLESS), in_place=True, peer_timeout=2) as job:
        job.start()
        job.until(lambda p: p.step > 5 and p.world_size == 2)  # the first may take steps before the second is there
        pid = job.kill_inner(Role.WORKER, 1, signal.SIGSTOP)
        wait_for("it to be missed", lambda: "worker-1 was silent" in job.log(Role.MASTER), 20)
        assert job.inner(Role.WORKER, 1) == [pid]
        os.kill(pid, signal.SIGCONT)


def test_sigterm_reaches_the_process_and_its_end_is_the_pods(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(**SERVED, **checkpoints(1000), trainer=ENDLESS), in_place=True) as job:
        job.start()
        job.until(lambda p: p.step > 5 and p.world_size == 2)  # the first may take steps before the second is there
        job.kill(Role.WORKER, 1, signal.SIGTERM)
        assert job.wait(Role.WORKER, 1, timeout=20) == 143
        assert job.termination(Role.WORKER, 1).message == "ended by SIGTERM"


def test_sigterm_while_a_process_starts_leaves_the_same_message(tmp_path: Path) -> None:
    """Its handler is there before the imports, which take seconds."""
    with Job(folder=tmp_path, spec=digits(**SERVED, trainer=ENDLESS), in_place=True, program=True) as job:
        job.start_one(Role.WORKER, 0)
        status = Path(f"/proc/{job.processes[Role.WORKER, 0].pid}/status")
        wait_for("its handler", lambda: _handles(status, signal.SIGTERM), 30)
        job.kill(Role.WORKER, 0, signal.SIGTERM)
        assert job.wait(Role.WORKER, 0, timeout=20) == 143
        assert job.termination(Role.WORKER, 0).message == "ended by SIGTERM"


def _handles(status: Path, number: signal.Signals) -> bool:
    caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


CHILD = """
import subprocess
from disttrain_trainer.examples import digits

def model(config):
    child = subprocess.Popen(["sleep", "1000"])
    with open("children", "a") as file:
        print(child.pid, file=file)
    return digits.model(config)
"""


def running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_what_a_lost_process_had_started_goes_with_it_and_its_metrics_come_back(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    spec = digits(worker={"replicas": 1}, trainer=ENDLESS | {"model": "child:model"})
    with Job(folder=tmp_path, spec=spec, in_place=True) as job:
        port = job.free_port()
        before = job.environment
        job.environment = lambda role, index: (  # type: ignore[method-assign]
            before(role, index) | ({"DISTTRAIN_METRICS_PORT": str(port)} if role is Role.WORKER else {})
        )

        def scraped() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    return b"disttrain_step{" in answer.read()
            except OSError:
                return False

        job.start()
        wait_for("a scrape", scraped, 30)
        job.kill_inner(Role.WORKER, 0)
        job.until(lambda p: of(p, Role.WORKER, 0) is not None)
        wait_for("a scrape after it", scraped, 30)
        first, second = map(int, (tmp_path / "children").read_text().split())
        assert (running(first), running(second)) == (False, True)
        job.kill(Role.WORKER, 0)  # the launcher: its processes go with it
        job.wait(Role.WORKER, 0)
        wait_for("its port to be free", lambda: not scraped(), 10)


def test_a_process_that_comes_back_has_the_torch_that_its_launcher_loaded(tmp_path: Path) -> None:
    def torch_of(pid: int) -> str:
        """Where it lies in memory: by address space layout randomisation elsewhere in every process that loads it itself."""
        return next(line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "libtorch_cpu" in line)

    with Job(folder=tmp_path, spec=digits(trainer=ENDLESS), in_place=True) as job:
        job.start()
        job.until(lambda p: p.step > 20)
        before = job.kill_inner(Role.WORKER, 1)
        wait_for("another process", lambda: job.inner(Role.WORKER, 1) not in ([], [before]), 30)
        (after,) = job.inner(Role.WORKER, 1)
        assert torch_of(after) == torch_of(job.processes[Role.WORKER, 1].pid)
        job.until(lambda p: p.generation == 2 and p.world_size == 2)


def test_of_several_processes_one_comes_back(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(worker={"replicas": 1}, trainer=ENDLESS), in_place=True) as job:
        job.config = job.config.model_copy(update={"processes_per_worker": 2})
        job.start()
        job.until(lambda p: p.step > 20)
        metrics, first, second = job.inner(Role.WORKER, 0)
        os.kill(second, signal.SIGKILL)
        progress_then = job.until(lambda p: p.generation == 2 and p.world_size == 2)
        counted = of(progress_then, Role.WORKER, 0)
        assert counted is not None
        assert counted.restarts == 1
        assert job.inner(Role.WORKER, 0)[:2] == [metrics, first]
