"""User code shares the worker's process: what it can break there is guarded, and the code at fault is named."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from disttrain.api import environment
from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, manifests, served

FACTORIES = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def model(config):
    return nn.Linear(4, 2)

def dataset(config, split):
    return TensorDataset(torch.ones(64, 4), torch.zeros(64, dtype=torch.int64))

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""


def with_code(folder: Path, code: str, **changes: Any) -> Job:
    (folder / "users_code.py").write_text(FACTORIES + code)
    chosen = {name: f"users_code:{name}" for name in ("model", "dataset", "loss")}
    trainer = {**chosen, "evaluate": None, "batchSize": 32, "epochs": 2}
    return Job(folder=folder, spec=digits(worker={"replicas": 1}, trainer=trainer) | changes)


def ends(folder: Path, code: str, *, with_: int, **changes: Any) -> tuple[Any, str]:
    """The termination message and the log of a worker with this code of the user's, which ends with this exit code."""
    with with_code(folder, code, **changes) as job:
        job.start()
        assert job.wait(Role.WORKER) == with_, job.logs()
        return job.termination(Role.WORKER), job.log(Role.WORKER)


GROUP = "torch.distributed.init_process_group('gloo', init_method='tcp://127.0.0.1:1', rank=0, world_size=1)"


@pytest.mark.parametrize(
    ("code", "field"),
    [
        pytest.param(f"\nimport torch.distributed\n{GROUP}\n", "trainer.model", id="import"),
        pytest.param(f"\ndef dataset(config, split):\n    {GROUP}\n", "trainer.dataset", id="factory"),
        pytest.param(f"\ndef loss(model, batch):\n    {GROUP}\n", "trainer.loss", id="loss"),
    ],
)
@pytest.mark.parametrize("strategy", [{}, served("Sync")], ids=["DataParallel", "ParameterServer"])
def test_a_process_group_of_user_code_is_wrong_input_that_names_its_line(
    tmp_path: Path, strategy: dict[str, Any], code: str, field: str
) -> None:
    termination, log = ends(tmp_path, code, with_=2, **strategy)
    line = (FACTORIES + code)[: (FACTORIES + code).index(GROUP)].count("\n") + 1
    assert termination.message.startswith(
        f"{field} calls torch.distributed.init_process_group ({tmp_path}/users_code.py:{line})"
    )
    assert "Traceback" not in log


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import logging.config\nlogging.config.dictConfig({'version': 1})", id="dictConfig"),
        pytest.param("import logging\nlogging.disable(logging.CRITICAL)", id="disable"),
        pytest.param("import logging, os\nlogging.basicConfig(force=True, filename=os.devnull)", id="basicConfig"),
        pytest.param("import sys\nsys.stderr.close()", id="standard error closed"),
        pytest.param("import sys\nsys.stdout = sys.stderr = None", id="no standard error"),
    ],
)
def test_the_trainers_own_errors_stay_in_the_log_whatever_user_code_does_to_logging(tmp_path: Path, code: str) -> None:
    nan = "\ndef loss(model, batch):\n    return model(batch[0]).mean() * float('nan')\n"
    _, log = ends(tmp_path, f"\n{code}\n{nan}", with_=1)
    assert "ERROR worker-0 0 the loss is nan on worker-0 at step 0" in log


def test_a_traceback_of_user_code_is_shown_though_standard_error_is_closed(tmp_path: Path) -> None:
    _, log = ends(tmp_path, "\nimport sys\ndef loss(model, batch):\n    sys.stderr.close()\n    1 / 0\n", with_=1)
    assert "ZeroDivisionError" in log


@pytest.mark.parametrize(
    "handler", ["signal.SIG_DFL", "signal.SIG_IGN", "lambda *_: sys.exit(0)"], ids=["default", "ignored", "exit"]
)
def test_a_handler_of_sigterm_in_user_code_does_not_keep_a_worker_from_saving(tmp_path: Path, handler: str) -> None:
    code = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, {handler})
def loss(model, batch):
    time.sleep(0.01)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""
    with with_code(tmp_path, code, **checkpoints(1000)) as job:
        job.config = job.config.model_copy(
            update={"trainer": job.config.trainer.model_copy(update={"epochs": None, "max_steps": 100_000})}
        )
        job.start()
        job.until(lambda progress: progress.step > 3)
        job.processes[Role.WORKER, 0].process.terminate()
        assert job.wait(Role.WORKER) == 143, job.logs()
        assert "trainer.model replaces the handler of SIGTERM" in job.log(Role.WORKER)
    assert manifests(tmp_path / "checkpoints"), "it saved before it ended"


def test_a_worker_whose_code_changes_the_folder_and_autograd_trains_and_saves(tmp_path: Path) -> None:
    code = """
import os
os.chdir('/')
def dataset(config, split):
    torch.set_grad_enabled(False)
    return TensorDataset(torch.ones(64, 4), torch.zeros(64, dtype=torch.int64))
"""
    termination, _ = ends(tmp_path, code, with_=0)
    assert termination.done


def test_a_child_that_user_code_forks_says_nothing_in_its_parents_name(tmp_path: Path) -> None:
    code = """
import os
def dataset(config, split):
    if os.fork() == 0:
        raise RuntimeError("only in the child")
    os.wait()
    return TensorDataset(torch.ones(64, 4), torch.zeros(64, dtype=torch.int64))
"""
    termination, log = ends(tmp_path, code, with_=0)
    assert termination.done
    assert "only in the child" in log


def test_a_worker_that_leaves_with_0_does_not_say_that_it_is_done(tmp_path: Path) -> None:
    code = "\nimport os\ndef loss(model, batch):\n    os._exit(0)\n"
    with with_code(tmp_path, code) as job:
        job.start()
        assert job.wait(Role.WORKER) == 0
        assert not job.termination(Role.WORKER).done


def test_sys_exit_0_in_a_factory_is_a_failure(tmp_path: Path) -> None:
    termination, _ = ends(tmp_path, "\nimport sys\ndef model(config):\n    sys.exit(0)\n", with_=1)
    assert not termination.done
    assert "SystemExit: 0" in termination.message


def test_a_file_named_like_a_module_of_python_breaks_no_process_and_is_named(tmp_path: Path) -> None:
    for name in ("random", "types", "queue", "select", "socket", "signal", "logging", "torch", "disttrain"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    env = {
        environment.JOB: "{}",
        environment.ROLE: "worker",
        environment.TERMINATION_LOG: str(tmp_path / "termination"),
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "disttrain_trainer"],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "DISTTRAIN_JOB: " in done.stderr
    (tmp_path / "disttrain.py").unlink()
    _, log = ends(tmp_path, "", with_=0)
    assert "logging.py, queue.py, random.py, select.py, signal.py, socket.py, torch.py, types.py in" in log


def test_a_thread_that_user_code_leaves_behind_does_not_keep_the_process(tmp_path: Path) -> None:
    code = """
import threading, time
threading.Thread(target=time.sleep, args=(600,), name="of-the-user").start()
from disttrain_trainer.runtime import script_runner
script_runner.leave(3, timeout_seconds=0.5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3
    assert "of-the-user" in done.stderr
