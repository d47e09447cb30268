"""Processes with one store, in which functions of a test run as the ranks of a group, one group after the other."""

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from disttrain_trainer.parallel.process_group import AbortableProcessGroup
from disttrain_trainer.runtime import machine

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.pipelining",
        "torch._dynamo",
        "disttrain_trainer.parallel.process_group",
    ]
)
_TIMEOUT = timedelta(seconds=60)


class MeshRanks:
    """Up to `most` ranks; they start when they are first needed."""

    def __init__(self, most: int = 4) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._most = most
        self._round = 0
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
        """What function(*arguments) returns in each rank of a group of this size. Raises AssertionError with a rank's traceback."""
        while len(self._ranks) < self._most:
            ours, theirs = _forks.Pipe()
            process = _forks.Process(target=_serve, args=(theirs, self._store.port), daemon=True)
            process.start()
            self._ranks.append((process, ours))
        self._round += 1
        for rank, (_, connection) in enumerate(self._ranks[:size]):
            connection.send((self._round, rank, size, function, arguments, keywords))
        answers: dict[Connection, Any] = {}
        connections = [connection for _, connection in self._ranks[:size]]
        while waiting := [connection for connection in connections if connection not in answers]:
            for connection in wait(waiting):
                try:
                    answers[connection], error = connection.recv()  # type: ignore[union-attr, index]
                except EOFError:
                    error = "a rank has ended"
                if error:  # the others wait for it
                    self.close()
                    raise AssertionError(error)
        return [answers[connection] for connection in connections]

    def close(self) -> None:
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks.clear()


def _serve(connection: Connection, port: int) -> None:
    torch.set_num_threads(1)
    machine.take_role()
    while True:
        number, rank, size, function, arguments, keywords = connection.recv()

        def store(number: int = number) -> dist.Store:
            connected = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
            return dist.PrefixStore(f"round-{number}", connected)

        try:
            with AbortableProcessGroup().joined("gloo", store=store, rank=rank, size=size, timeout=_TIMEOUT):
                answer = function(*arguments, **keywords)
            connection.send((answer, ""))
        except BaseException:
            connection.send((None, traceback.format_exc()))
