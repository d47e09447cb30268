"""The processes of a benchmark that are ranks of one group."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

RANKS = 2
TIMEOUT = timedelta(seconds=300)


def store(port: int) -> Callable[[], dist.Store]:
    """Connects a rank with the store at this port: for AbortableProcessGroup.joined."""
    return lambda: dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)


def measure(run: Callable[..., None], *arguments: Any, count: int = RANKS) -> Any:
    """Starts `count` processes of run(results, rank, port, *arguments), with a store at the port. Blocks until they end.

    Returns what one of them has sent through the connection `results`.
    """
    spawn = multiprocessing.get_context("spawn")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    here, there = spawn.Pipe()
    ranks = [
        spawn.Process(target=run, args=(there, rank, server.port, *arguments), daemon=True) for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    there.close()  # so that ranks that fail end the wait
    found = here.recv()
    for rank in ranks:
        rank.join()
    return found
