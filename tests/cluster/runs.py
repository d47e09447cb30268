"""The folder of one run of a test cluster: its logs, keys and data, and who owns it.

A run that was ended properly leaves nothing. One whose test process was killed leaves a folder, whose `owner` file then names a
process that no longer exists: the next start sweeps it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from cluster.processes import read_pid, write_pid
from cluster.programs import cache_folder


def runs_folder() -> Path:
    return cache_folder() / "runs"


def new_run(kind: str) -> Path:
    """A folder for a run of this kind (`node`, `controlplane`), owned by this process. Its name is unique on the machine."""
    name = f"{kind}-{secrets.token_hex(3)}"
    folder = runs_folder() / name
    folder.mkdir(parents=True, mode=0o755)
    write_pid(folder / "owner", os.getpid())
    return folder


def sweep(kind: str, clean: Callable[[Path], None]) -> None:
    """Cleans and removes the runs of this kind whose owner is gone; kept logs (see `keep_logs`) stay."""
    for folder in sorted(runs_folder().glob(f"{kind}-*")):
        owner = folder / "owner"
        if owner.exists() and read_pid(owner) is None:
            kill_recorded(folder)
            clean(folder)
            shutil.rmtree(folder, ignore_errors=True)


def kill_recorded(folder: Path) -> None:
    """Ends the programs whose pid files lie in the folder: those very processes, never another that got the same number."""
    for file in (*folder.glob("*.pid"), *folder.glob("*/*.pid")):  # of the run, and of its further machines
        if (pid := read_pid(file)) is not None:
            os.kill(pid, signal.SIGKILL)


def remove_run(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def keep_logs(folder: Path, why: str) -> Path:
    """Keeps a failed run's logs, in a folder that it returns and names on standard error; of the last twenty runs."""
    kept = cache_folder() / "failed" / folder.name
    older = sorted(kept.parent.glob("*"), key=lambda p: p.stat().st_mtime)[:-20] if kept.parent.exists() else []
    for one in older:
        shutil.rmtree(one, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(kept, ignore_errors=True)
    if (folder / "log").exists():
        shutil.copytree(folder / "log", kept, ignore_dangling_symlinks=True)
        print(f"{why}: the logs of the cluster's programs are in {kept}", file=sys.stderr, flush=True)
    return kept
