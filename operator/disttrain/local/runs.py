"""The runs of the current folder, and which of them a name stands for. Imports none of the models: verbs that only read a run are quick.

Not here: what is in the folder of a run (folders.py).
"""

import fcntl
import os
from pathlib import Path
from typing import Final

ROOT: Final = Path(".disttrain")


def runs_of(job_name: str, root: Path = ROOT) -> list[Path]:
    """The folders of a job's runs, the newest first."""
    # <job>-<date>-<time>-<uid>: a job's name may itself hold dashes; and what the user gave may be no name at all, but a path.
    runs = [
        path.parent for path in (root / "runs").glob("*/run.json") if path.parent.name.rsplit("-", 3)[0] == job_name
    ]
    return sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)


class NoSuchRun(Exception):
    """There is no such run in this folder; the text says what to name."""


def find_run(run: str, root: Path = ROOT) -> Path:
    """The folder of a run: itself, its name, or the name of its job, which stands for the newest run, and rather for one that goes on.

    Raises NoSuchRun.
    """
    for path in (Path(run), root / "runs" / run):
        if (path / "run.json").is_file():
            return path
    runs = runs_of(run, root)
    if not runs:
        raise NoSuchRun(
            f"there is no run {run}: name a folder of {root / 'runs'}, or a job that was run in the current folder"
        )
    return ([path for path in runs if is_running(path)] or runs)[0]


def is_run(run: str, root: Path = ROOT) -> bool:
    """Whether this folder has such a run: what has none is meant to be a job of the cluster."""
    try:
        find_run(run, root)
    except NoSuchRun:
        return False
    return True


def no_run(run: str, root: Path = ROOT) -> str:
    """What an error of the cluster begins with, where this folder was looked at first."""
    return f"there is no run {run} in {root / 'runs'}; "


def is_running(path: Path) -> bool:
    """Whether the run of this folder goes on."""
    descriptor = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
