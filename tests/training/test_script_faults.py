"""What may go wrong around a script's program: SIGTERM at any moment, a lost master, children that stay, noise after the cause."""

import signal
import time
from pathlib import Path

from cluster.processes import wait_for
from disttrain.api.names import Role
from training.job import Job
from training.test_scripts import script

WAITING = """
import os, signal, sys
rank = int(os.environ["RANK"])
{before}
open(f"up-{{rank}}", "w").close()
while True: signal.pause()
"""


def up(job: Job, count: int = 2) -> None:
    wait_for("the script to run", lambda: all((job.folder / f"up-{rank}").exists() for rank in range(count)), 30)


def test_sigterm_ends_an_agent_whose_program_is_done(tmp_path: Path) -> None:
    with script(tmp_path, WAITING.format(before="if rank == 0: open('up-0', 'w').close(); sys.exit(0)")) as job:
        job.start()
        up(job)
        job.kill(Role.WORKER, 0, signal.SIGTERM)
        assert job.wait(Role.WORKER, 0, timeout=10) == 143
        assert job.termination(Role.WORKER, 0).message == "ended by SIGTERM"


def test_sigterm_between_two_worlds_ends_an_agent_and_no_program_begins(tmp_path: Path) -> None:
    with script(tmp_path, WAITING.format(before="")) as job:
        job.start()
        up(job)
        job.kill(Role.WORKER, 1)
        job.wait(Role.WORKER, 1)
        wait_for("the round to be over", lambda: "is over" in job.log(Role.WORKER, 0), 20)
        job.kill(Role.WORKER, 0, signal.SIGTERM)
        assert job.wait(Role.WORKER, 0, timeout=10) == 143
        assert job.log(Role.WORKER, 0).count("the script runs") == 1


def test_a_program_that_saves_its_state_at_sigterm_gets_it_once_and_is_not_ended_because_another_pod_is_gone(
    tmp_path: Path,
) -> None:
    handler = """
def save(*_):
    open("saving", "a").write("x")
    while not os.path.exists("saved"): signal.sigtimedwait([signal.SIGUSR1], 0.05)
    sys.exit(0)
if rank == 0: signal.signal(signal.SIGTERM, save)
"""
    with script(tmp_path, WAITING.format(before=handler)) as job:
        job.start()
        up(job)
        job.kill(Role.WORKER, 0, signal.SIGTERM)
        wait_for("it to save", (tmp_path / "saving").exists, 10)
        job.kill(Role.WORKER, 1, signal.SIGTERM)
        assert job.wait(Role.WORKER, 1, timeout=10) == 143
        job.until(lambda progress: progress.world_size == 0, tolerate=True)  # rank 0 knows that the round is over
        (tmp_path / "saved").touch()
        assert job.wait(Role.WORKER, 0, timeout=20) == 143
    assert (tmp_path / "saving").read_text() == "x"


def test_a_program_whose_child_stays_ends_all_the_same(tmp_path: Path) -> None:
    text = "import subprocess, sys\nprint(subprocess.Popen(['sleep', '60']).pid, file=open('pid', 'w'))\n"
    with script(tmp_path, text, workers=1) as job:
        job.train(timeout=30)
        pid = (tmp_path / "pid").read_text().strip()
        wait_for(
            "its child to be gone",
            lambda: not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text(),
            5,
        )


def test_what_has_no_end_of_line_is_shown_at_once(tmp_path: Path) -> None:
    with script(tmp_path, WAITING.format(before="sys.stderr.write('37 %'); sys.stderr.flush()"), workers=1) as job:
        job.start()
        wait_for("a progress bar", lambda: "37 %" in job.log(Role.WORKER, 0), 20)


def test_the_termination_message_is_the_exception_of_the_process_that_failed_first_and_no_noise_after_it(
    tmp_path: Path,
) -> None:
    text = """
import atexit, os, signal, sys
if os.environ["LOCAL_RANK"] == "1":
    atexit.register(lambda: print("a warning at exit", file=sys.stderr))
    while not os.path.exists("loud"): signal.sigtimedwait([signal.SIGUSR1], 0.05)
    raise ValueError("the real cause")
print("nothing of interest", file=sys.stderr, flush=True)
open("loud", "w").close()
while True: signal.pause()
"""
    with script(tmp_path, text, workers=1, processes=2) as job:
        job.start()
        assert job.wait(Role.WORKER, 0, timeout=30) == 1
        assert job.termination(Role.WORKER, 0).message == "ValueError: the real cause"
        assert job.termination(Role.WORKER, 0).where == f"{tmp_path}/train.py:6"


def test_a_program_that_fails_while_the_master_is_away_is_judged_by_the_next_one(tmp_path: Path) -> None:
    text = """
import os, signal
open("up-0", "w").close()
while not os.path.exists("go"): signal.sigtimedwait([signal.SIGUSR1], 0.05)
raise ValueError("mine")
"""
    with script(tmp_path, text, workers=1) as job:
        job.start()
        up(job, 1)
        job.kill(Role.MASTER)
        job.wait(Role.MASTER)
        (tmp_path / "go").touch()
        wait_for("it to fail", lambda: "ValueError: mine" in job.log(Role.WORKER, 0), 10)
        job.start_one(Role.MASTER)
        assert job.wait(Role.WORKER, 0, timeout=30) == 1
        assert job.termination(Role.WORKER, 0).message == "ValueError: mine"


def test_a_lost_master_takes_its_store_with_it_and_the_script_starts_again(tmp_path: Path) -> None:
    text = """
import os, signal
import torch.distributed as dist
dist.init_process_group("gloo")
open(f"up-{dist.get_rank()}", "w").close()
while not os.path.exists("go"): signal.sigtimedwait([signal.SIGUSR1], 0.05)
dist.new_group([0, 1])
dist.barrier()
dist.destroy_process_group()
"""
    with script(tmp_path, text) as job:
        job.start()
        up(job)
        job.kill(Role.MASTER)
        job.wait(Role.MASTER)
        job.start_one(Role.MASTER)
        job.until(lambda progress: progress.generation == 2)
        (tmp_path / "go").touch()
        job.complete()
        assert job.restarts == {}


def test_the_step_falls_back_with_a_script_that_begins_again(tmp_path: Path) -> None:
    text = """
import os, signal
from disttrain_trainer import session
for step in range(1_000_000):
    session.report(step=step + 1, loss=0.5, samples=8)
    while os.path.exists("stop") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1": signal.pause()
    signal.sigtimedwait([signal.SIGUSR1], 0.002)
"""
    with script(tmp_path, text) as job:
        job.start()
        before = job.until(lambda progress: progress.step > 100).step
        (tmp_path / "stop").touch()
        job.kill(Role.WORKER, 1)
        job.wait(Role.WORKER, 1)
        job.start_one(Role.WORKER, 1)
        began = time.monotonic()
        progress = job.until(lambda progress: progress.generation == 2 and progress.step < 100, tolerate=True)
        assert progress.redone_steps >= before - progress.step
        assert time.monotonic() - began < 30
