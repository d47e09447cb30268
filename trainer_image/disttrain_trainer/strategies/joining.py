"""What the agent says about a script whose processes have not joined one another."""

import os
from pathlib import Path

from disttrain.api.runtime import JobConfig

_SPAWNED = (b"from multiprocessing.spawn import", b"from multiprocessing.forkserver import")
"""In the command line of a process that Python's multiprocessing starts with the methods spawn and forkserver."""


def spawns(groups: frozenset[int], root: Path = Path("/proc")) -> bool:
    """Whether a process in one of these process groups was started by multiprocessing, as torch.multiprocessing.spawn does."""
    if not root.is_dir():
        return False
    pids = [int(name) for name in os.listdir(root) if name.isdigit()]
    return any(_is_spawned(root / str(pid), groups) for pid in pids if pid not in groups)


def _is_spawned(process: Path, groups: frozenset[int]) -> bool:
    try:
        stat = (
            (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
        )  # the name before may hold spaces
        command = (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return False
    return int(stat[2]) in groups and any(mark in command for mark in _SPAWNED)


def hint(config: JobConfig, *, seconds: float, spawned: bool) -> str:
    """What may be wrong, and what to do about it."""
    store = config.addresses.rendezvous
    if spawned:
        return (
            f"no process of the script has joined the rendezvous at {store} in {seconds:.0f} s, but the script starts processes of its "
            "own. Under trainer.script the processes are started for it: set worker.replicas or worker.processesPerWorker in place of "
            "torch.multiprocessing.spawn, and let each process take rank and address from the environment; or run the program as "
            "trainer.command, which may start what it likes"
        )
    return (
        f"no process of the script has joined the rendezvous at {store} in {seconds:.0f} s. Unless it still loads, it does not train "
        "together with the others: call torch.distributed.init_process_group() without an address and rank of the script's own, and start "
        "processes by worker.replicas or worker.processesPerWorker in place of torch.multiprocessing.spawn; or use trainer.command"
    )
