"""The agent of a script: runs the user's file unchanged, as torchrun would, in one world after another.

When a member is lost, every agent stops its program and starts it again in the next generation; the store at the master keeps the
generations apart by TORCHELASTIC_RESTART_COUNT. Not here: what the program reports (session.py), ranks of our own loop (parallel/).
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import IO

from disttrain.api import environment
from disttrain.api.names import SCRIPT_PATH
from disttrain.api.runtime import JobConfig
from disttrain_trainer import machine
from disttrain_trainer.address import split_address
from disttrain_trainer.control import Control
from disttrain_trainer.errors import ProgramFailed, Terminated, WrongInput
from disttrain_trainer.membership import Rank, World
from disttrain_trainer.messages import Say
from disttrain_trainer.metrics import Metrics
from disttrain_trainer.process import Process

log = logging.getLogger(__name__)

SETTLE = 1.0
"""Seconds in which the master may say that another member was lost, before a failed program is reported as the cause."""
STOP_GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL, for a program whose world is over."""
LAST_LINES = 50

_FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+)')
_RANK = re.compile(r"^\[rank\d+\]: ?")
"""What torch puts before each line of a traceback once its process group is up."""
_FRAMEWORK = ("site-packages", "/lib/python", "<frozen", "<string>")


class Program:
    """The processes of the user's file in one world: one for each training process of the pod."""

    def __init__(self, *, process: Process, world: World, file: Path, control: Control) -> None:
        config = process.config
        self._control = control
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._children = []
        self._codes: dict[int, int] = {}
        command = [sys.executable, str(file), *(config.trainer.script.args if config.trainer.script else ())]
        dies_with_agent = machine.dying_with_parent()
        for local_rank in range(config.processes_per_worker):
            child = subprocess.Popen(
                command,
                env={
                    **os.environ,
                    **contract(config, index=process.index, local_rank=local_rank, generation=world.generation),
                },
                stderr=subprocess.PIPE,
                process_group=0,
                preexec_fn=dies_with_agent,  # noqa: PLW1509 - only a system call, whose code is loaded before the fork
            )
            self._children.append(child)
            assert child.stderr is not None
            threading.Thread(target=self._watch, args=(local_rank, child, child.stderr), daemon=True).start()

    def result(self) -> int | None:
        """None while it runs; then 0, or the code of the first of its processes that failed (128 + n for signal n)."""
        failed = [code for code in self._codes.values() if code]
        if failed:
            return failed[0]
        return 0 if len(self._codes) == len(self._children) else None

    def stop(self) -> None:
        """Ends what still runs, and its children: SIGTERM, and SIGKILL after the grace. Returns when all are gone."""
        self.signal(signal.SIGTERM)
        with self._control.changed:
            gone = self._control.changed.wait_for(lambda: len(self._codes) == len(self._children), STOP_GRACE)
        if not gone:
            self.signal(signal.SIGKILL)
        for child in self._children:
            child.wait()

    def signal(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)

    def failure(self, code: int) -> ProgramFailed:
        """The error of a program that failed: the last line that it wrote, and the last frame of its traceback that is the user's."""
        lines = [line for raw in self._lines if (line := _RANK.sub("", raw)).strip()]
        frames = [match.groups() for line in lines if (match := _FRAME.match(line))]
        own = [frame for frame in frames if not any(part in frame[0] for part in _FRAMEWORK)] or frames
        where = ":".join(own[-1]) if own else ""
        return ProgramFailed(
            code, f"the script ended with code {code}", last_line=lines[-1].strip() if lines else "", where=where
        )

    def _watch(self, local_rank: int, child: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        """Hands standard error on, keeps its end, and tells when the process is gone."""
        for line in stderr:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            self._lines.append(line.decode(errors="replace").rstrip("\n"))
        code = child.wait()
        with self._control.changed:
            self._codes[local_rank] = 128 - code if code < 0 else code
            self._control.changed.notify_all()


class Agent:
    """The agent of one pod."""

    def __init__(self, process: Process, metrics: Metrics) -> None:
        self._process = process
        self._metrics = metrics
        self._rank = Rank()
        self._file = script_file(process.config)
        self._program: Program | None = None
        self._terminated = False
        self._control = Control(
            process=process,
            describe=self._rank.describe,
            on_message=self._rank.on_message,
            on_released=lambda: None,
            agent=True,
        )

    def run(self) -> None:
        """Until everybody's program is done. Raises ProgramFailed when this one's failed of itself, Terminated after SIGTERM."""
        control, rank = self._control, self._rank
        machine.on_sigterm(self._terminate)
        machine.set_interface(os.environ, toward=split_address(self._process.config.addresses.rendezvous)[0])
        control.start()
        while True:
            rank.get_ready(control)
            world = rank.await_world(control, timeout=self._process.config.startup_timeout_seconds)
            if world is None or self._run_in(world):
                return
            self._metrics.recoveries += 1

    def _run_in(self, world: World) -> bool:
        """The program in one world. True when the job is done, False when the world is over."""
        control, rank = self._control, self._rank
        program = self._program = Program(process=self._process, world=world, file=self._file, control=control)
        log.info("generation %d: the script runs", world.generation)
        try:

            def over() -> bool:
                return rank.world is not world

            code = control.wait(lambda: -1 if over() else program.result(), what="the script")
            if self._terminated:
                program.stop()
                raise Terminated
            if code == 0:
                rank.get_done(control)
                return rank.await_end(control, world)
            if code > 0:
                with control.changed:
                    control.changed.wait_for(over, SETTLE)
                if not over():
                    failure = program.failure(code)
                    control.send(Say.FAILED, message=failure.last_line or str(failure))
                    control.wait(lambda: True if rank.blamed or over() else None, what="the master's judgement")
                    if rank.blamed:
                        raise failure
                log.warning("the script ended with code %d because a peer was lost", code)
            log.info("generation %d is over: a worker was lost", world.generation)
            return False
        finally:
            program.stop()

    def _terminate(self) -> None:
        """SIGTERM: the program hears it too, and has the grace period; then this process ends, not as if it were done."""
        with self._control.changed:
            self._terminated = True
            program = self._program
        if program is None:
            os._exit(Terminated.exit_code)
        program.signal(signal.SIGTERM)


def contract(config: JobConfig, *, index: int, local_rank: int, generation: int) -> dict[str, str]:
    """torchrun's environment of a training process."""
    host, port = split_address(config.addresses.rendezvous)
    count = config.processes_per_worker
    return {
        environment.MASTER_ADDR: host,
        environment.MASTER_PORT: str(port),
        environment.RANK: str(index * count + local_rank),
        environment.WORLD_SIZE: str(config.world_size),
        environment.LOCAL_RANK: str(local_rank),
        environment.LOCAL_WORLD_SIZE: str(count),
        environment.GROUP_RANK: str(index),
        environment.USE_AGENT_STORE: "True",
        environment.RESTART_COUNT: str(generation),
        "TORCHELASTIC_RUN_ID": config.uid,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, machine.cpu_limit() // count)),
    }


def script_file(config: JobConfig) -> Path:
    """The user's file: of the ConfigMap, or in the image or the current folder. Raises WrongInput."""
    script = config.trainer.script
    assert script is not None, "the role of an agent needs a script"
    places = [Path(script.file)] if script.config_map is None else [Path(SCRIPT_PATH) / script.file, Path(script.file)]
    for path in places:
        if path.is_file():
            return path.absolute()
    origin = f"ConfigMap {script.config_map}" if script.config_map else f"{Path.cwd()} or the image"
    raise WrongInput(f"trainer.script.file: {script.file!r} is not in {origin}; put it there, or correct the name")


def run(process: Process, metrics: Metrics) -> None:
    """The role of a script's agent."""
    Agent(process, metrics).run()
