"""`disttrain run` as a user has it: a program of its own, in a folder of its own. Finds the processes that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster.processes import wait_for
from disttrain.local import guard

DISTTRAIN = Path(sys.executable).with_name("disttrain")


@dataclass
class Finished:
    """A run that is over."""

    code: int
    out: str
    err: str

    @property
    def job(self) -> dict[str, Any]:
        """The DistTrainJob on standard output."""
        job: dict[str, Any] = json.loads(self.out)
        return job

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


class Started:
    """A run that goes on."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        stdout: int | IO[Any] = subprocess.PIPE,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """`before` is called in the new process before it becomes `disttrain run`."""
        self.folder = folder

        def prepare() -> None:
            # Tests that run in the background, or with nohup, ignore these, and with them a run does.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            before()

        # NO_COLOR and COLUMNS: the tests may be run from a terminal of any kind.
        env = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"} | (environment or {})
        if (
            folder / "disttrain_trainer"
        ).is_dir():  # the stub: our processes do not look for modules in the current folder
            env["PYTHONPATH"] = str(folder.absolute())
        self.process = subprocess.Popen(
            [str(DISTTRAIN), "run", *arguments],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=prepare,
        )

    def finish(self, seconds: float = 90) -> Finished:
        """Waits for the end."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            out, err = self.process.communicate(timeout=30)
            raise AssertionError(f"did not end in {seconds:g} s:\n{out}\n{err}") from None
        return Finished(self.process.returncode, out or "", err)

    def finish_unread(self, seconds: float) -> int:
        """The exit code of a run whose output nothing reads."""
        code = self.process.wait(seconds)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return code

    def run_folder(self) -> Path:
        """The folder of this run."""
        return wait_for(
            "the folder of the run", lambda: next((self.folder / ".disttrain" / "runs").iterdir(), None), 20
        )

    def pid(self, name: str, seconds: float = 30) -> int:
        """The process of a role, such as worker-1, once its program is there."""
        return wait_for(f"the process of {name}", lambda: self._pids().get(name), seconds)

    def inner_pid(self, name: str, seconds: float = 30) -> int:
        """The training process that the launcher of a worker or server has started."""
        launcher = self.pid(name, seconds)
        return wait_for(f"the training process of {name}", lambda: next(iter(children(launcher)), None), seconds)

    def log(self, pod: str) -> str:
        """What a process printed so far."""
        file = self.run_folder() / "logs" / f"{pod}.log"
        return file.read_text() if file.exists() else ""

    def _pids(self) -> dict[str, int]:
        found = {}
        for pid in children(self.process.pid):
            environment = environment_of(pid)
            if role := environment.get("DISTTRAIN_ROLE"):
                found[f"{role}-{environment['DISTTRAIN_INDEX']}"] = pid
        return found


def run(folder: Path, *arguments: str, seconds: float = 90, environment: dict[str, str] | None = None) -> Finished:
    """A run from its beginning to its end."""
    return Started(folder, *arguments, environment=environment).finish(seconds)


def left_behind(folder: Path) -> list[int]:
    """Processes that still run and belong to a run of this folder."""
    uids = [json.loads(file.read_text())["uid"] for file in folder.glob(".disttrain/runs/*/run.json")]
    if not uids:
        raise LookupError("no run ever began here")
    return [pid for uid in uids for pid in guard.belonging(guard.MARK, uid)]


def running(words: str) -> list[int]:
    """Processes with these words in their command line, whatever they are started with."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if words in line:
            found.append(int(file.parent.name))
    return found


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; {} when it is gone."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def children(pid: int) -> list[int]:
    """The processes that a process started itself."""
    found: list[int] = []
    for thread in Path("/proc").glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):  # a thread ends, the others and their children do not
            found += map(int, thread.read_text().split())
    return found
