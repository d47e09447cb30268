"""What the user's code forks ends at SIGTERM, and its end is no SIGTERM to the process that forked it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.api import environment
from disttrain.api.trainer import Trainer
from unit.trainer.configs import command_config

FORKS = """
import multiprocessing, signal, sys, threading
from disttrain_trainer.runtime import machine

received = threading.Event()
machine.on_sigterm(received.set)

def work(up):
    up.set()
    signal.pause()

context = multiprocessing.get_context("fork")
up = context.Event()
child = context.Process(target=work, args=(up,))
child.start()
up.wait(20)
child.terminate()
child.join(20)
code, child_got_it = child.exitcode, received.wait(0.2)
child.kill()
signal.raise_signal(signal.SIGTERM)
sys.exit(0 if (code, child_got_it, received.wait(20)) == (-signal.SIGTERM, False, True) else f"{code} {child_got_it}")
"""


def test_a_forked_child_ends_at_sigterm_and_its_parent_does_not_get_it() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")


COMES_BACK = """
import os, sys
import numpy as np, torch
from torch import nn
from disttrain_trainer.data.loader import fetcher
from disttrain_trainer.model.objective import Objective
from disttrain_trainer.model.user_code import guarded

def forking():
    child = os.fork()
    if child == 0:
        ENDS
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

class Samples:
    def __len__(self): return 2
    def __getitem__(self, i):
        forking()
        return torch.ones(2)

def loss(model, batch):
    forking()
    return model(batch).sum()

try:
    with guarded("trainer.model"):
        forking()
    batch = fetcher(Samples(), device=torch.device("cpu"), field="trainer.dataset")(np.array([0]))
    Objective(nn.Linear(2, 1), loss)(batch, 1)
finally:
    print("connections are closed", flush=True)
"""


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no room')", 1, "no room\n" * 3),
        ("raise ValueError('mine')", 1, "ValueError: mine"),
        (
            "return torch.zeros(2)",
            1,
            "a child process that user code forked returned from that code; DistTrain ends it\n" * 3,
        ),
    ],
)
def test_a_child_that_user_code_forks_ends_where_that_code_ends_and_closes_nothing_of_its_parents(
    ends: str, code: int, said: str
) -> None:
    program = COMES_BACK.replace("ENDS", ends)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"child {code}\n" * 3 + "connections are closed\n"
    assert said in done.stderr


def test_a_process_of_a_role_that_the_launcher_forked_is_no_child_of_user_code() -> None:
    program = """
import os
from disttrain_trainer.entry import Entry
from disttrain_trainer.runtime import machine

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def rank():
    os.execvp = lambda *_: machine.leave_forked_child()  # the job is a command
    Entry().run()
    assert child(machine.leave_forked_child) == 1

print(child(rank))
"""
    environ = {**os.environ, environment.JOB: command_config().encode(), environment.ROLE: "worker"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "7\n", done.stderr


NO_ROOM = """
import errno, os, sys
from disttrain_trainer.entry import main

def full():
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

os.fork = full
sys.exit(main([]))
"""


def test_a_launcher_that_can_start_no_process_is_replaced_and_not_taken_for_a_mistake_of_the_user(
    tmp_path: Path,
) -> None:
    loop = {
        "model": "m:m",
        "dataset": "m:d",
        "optimizer": {"name": "SGD", "learningRate": 0.1},
        "maxSteps": 9,
        "batchSize": 32,
    }
    config = command_config().model_copy(update={"trainer": Trainer.model_validate(loop)})
    environ = {
        **os.environ,
        environment.JOB: config.encode(),
        environment.ROLE: "worker",
        environment.POD_UID: "pod",
        environment.TERMINATION_LOG: str(tmp_path / "message"),
    }
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM], env=environ, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 134
    assert "Traceback" not in done.stderr
    assert (
        "no process can be started in this pod: Resource temporarily unavailable" in (tmp_path / "message").read_text()
    )
