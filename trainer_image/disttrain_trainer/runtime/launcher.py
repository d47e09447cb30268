"""A pod with several training processes, one for each of its GPUs: starts them, and ends when they do.

Each of them is a rank with its own connection to the master.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from disttrain.api import environment
from disttrain.api.environment import ExitCode
from disttrain.api.runtime import Termination
from disttrain_trainer.errors import CRASHED, ProgramFailed, Terminated
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.pod_metrics import PodMetrics
from disttrain_trainer.runtime.process import Process

log = logs.get_logger(__name__)


def run(process: Process, metrics: PodMetrics) -> None:
    """Supervises the pod's ranks. Raises ProgramFailed with the code and the termination message of the first that failed."""
    count = process.config.processes_per_worker
    terminated = False
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        messages = [Path(folder) / str(rank) for rank in range(count)]
        metrics.sockets = [Path(folder) / f"metrics-{rank}" for rank in range(count)]
        ranks = {}
        for local_rank in range(count):
            child = _start(
                process, local_rank, termination_log=messages[local_rank], metrics=metrics.sockets[local_rank]
            )
            ranks[child.pid] = (local_rank, child)

        def forward(_signal: int, _frame: FrameType | None) -> None:
            nonlocal terminated
            terminated = True
            _signal_all(ranks, signal.SIGTERM)

        signal.signal(signal.SIGTERM, forward)
        while ranks:
            pid, status = os.wait()
            if pid not in ranks:
                continue
            local_rank, child = ranks.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            child.returncode = code  # reaped here: Popen must not wait for it again
            code = 128 - code if code < 0 else code
            message = (
                Termination.decode(messages[local_rank].read_text()) if messages[local_rank].exists() else Termination()
            )
            if message.done:
                continue
            _signal_all(ranks, signal.SIGKILL)
            for _, other in ranks.values():
                other.wait()
            if terminated:
                raise Terminated
            name = f"training process {local_rank} of {process.name}"
            if code == ExitCode.DONE:
                raise ProgramFailed(
                    CRASHED, f"{name} ended with exit code 0 before the job was done: something in it called exit"
                )
            raise ProgramFailed(code, f"{name} ended with code {code}", last_line=message.message, where=message.where)
        if terminated:
            raise Terminated


def _start(process: Process, local_rank: int, *, termination_log: Path, metrics: Path) -> subprocess.Popen[bytes]:
    rank = process.index * process.config.processes_per_worker + local_rank
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "disttrain_trainer", "--local-rank", str(local_rank), "--metrics", str(metrics)],
        env={
            **os.environ,
            environment.LOCAL_RANK: str(process.config.local_rank(rank)),
            environment.RANK: str(rank),
            environment.TERMINATION_LOG: str(termination_log),
            environment.PARENT_PID: str(os.getpid()),
        },
    )


def _signal_all(ranks: dict[int, tuple[int, subprocess.Popen[bytes]]], number: signal.Signals) -> None:
    for pid in list(ranks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
