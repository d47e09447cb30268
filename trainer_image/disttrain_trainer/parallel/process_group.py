"""The process group of one round: made under its own prefix in the store, and left without waiting.

A wait ends when a peer is lost, not after a time: a closed connection ends it, and `end` ends it from another thread, so that a rank that
waits for a frozen peer goes on when the master ends the round. A peer that is only slow, because it writes a checkpoint or has more to
compute, is waited for.
"""

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore, Work  # type: ignore[attr-defined]  # missing in their __all__
from torch.futures import Future

from disttrain.api.runtime import JobConfig
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.runtime.sockets import split_address

_FDS = "/proc/self/fd"


class BrokenGroup(Exception):
    """A peer, or the connection to it, is lost: this round is over."""

    def __init__(self, error: Exception | str) -> None:
        super().__init__(str(error).strip().split("\n")[0])


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    work: Work
    tensor: torch.Tensor
    over: Future[torch.Tensor]


class AbortableProcessGroup:
    """The connections of one group, and the waits in it. gloo does not give its sockets out: they are those that this process opened
    while the
    group was made."""

    def __init__(self, *, backend: str, others: frozenset[int]) -> None:
        """others: ports of our own connections, which may be made again meanwhile."""
        self.error: RuntimeError | None = None
        """The error that ended an operation; its tensor is then undefined."""
        self._backend = backend
        self._others = others
        self._before = _sockets()
        self._ours: set[int] | None = None
        self._lock = threading.Lock()
        self._waiting = threading.Lock()
        self._waits: set[_Wait] = set()
        self._over = False
        self._abandoned: list[Work] = []

    def complete(self) -> None:
        """The group is made: sockets that this process opens from now on are not the group's."""
        with self._lock:
            self._ours = _sockets() - self._before

    def awaited(self, work: Work, tensor: torch.Tensor) -> Future[torch.Tensor]:
        """A future of an operation of gloo's and its tensor, complete when the operation or the round is over; see `error`.

        Without it the wait may last for the whole time-out of the group: gloo does not tell a send that is half written that its
        connection is broken (Pair::signalException passes over the unbound buffers in tx_).
        """
        wait = _Wait(work, tensor, Future())
        with self._waiting:
            self._waits.add(wait)
            late = self._over
        if late:
            self._abandon()
        else:
            work.get_future().add_done_callback(lambda future: self._done(wait, future))
        return wait.over

    @property
    def sockets(self) -> frozenset[int]:
        """The inodes of the connections, those that were opened while the group was made."""
        with self._lock:
            return frozenset(self._ours or ())

    def cut(self) -> None:
        """Closes them. torch's abort and destroy leave gloo's open, so that a neighbour in the ring would wait for a rank that has left."""
        with self._lock:
            for inode in _sockets() - self._before if self._ours is None else self._ours:
                _shut(inode, self._others)

    def end(self) -> None:
        """Ends the waits of another thread in the group. Does not block: NCCL's abort may take long, and has a thread of its own."""
        with self._waiting:
            self._over = True
        self.cut()
        self._abandon()
        group = dist.group.WORLD if dist.is_initialized() else None
        if group is not None and self._backend == "nccl":
            threading.Thread(target=_abort, args=(group,), name="abort", daemon=True).start()

    def leave(self) -> None:
        """Leaves the group without waiting for another rank."""
        if not dist.is_initialized():
            return
        group = dist.group.WORLD
        stuck = [work for work in self._abandoned if not work.is_completed()]
        if stuck and group is not None:
            # The group goes with its last reference, and waits for its threads: in a thread that has the time.
            threading.Thread(target=_outlive, args=(group, stuck), name="outlive", daemon=True).start()
        elif group is not None:
            _abort(group)  # before destroy: a peer may be gone, and nothing must wait for it
        del group
        dist.destroy_process_group()

    def _done(self, wait: _Wait, future: Future[list[torch.Tensor]]) -> None:
        error = None
        try:
            future.wait()
        except RuntimeError as its:
            error = its
        with self._waiting:
            awaited = wait in self._waits
            self._waits.discard(wait)
            self.error = self.error or error
        if awaited:
            wait.over.set_result(wait.tensor)

    def _abandon(self) -> None:
        with self._waiting:
            waits, self._waits = self._waits, set()
            if waits:
                self.error = self.error or RuntimeError("it ended within a step")
                self._abandoned += [wait.work for wait in waits]
        for wait in waits:
            wait.over.set_result(wait.tensor)


@contextmanager
def process_group(
    config: JobConfig, *, control: ControlClient, rank: CollectiveMember, this_round: Round, index: int, backend: str
) -> Iterator[AbortableProcessGroup | None]:
    """The default group of this round; a group of one needs none. Raises BrokenGroup when the peers do not come together.

    index: this rank's number. While it lives, `rank.group` is how the control thread ends it.
    """
    if config.world_size == 1:
        yield None
        return
    if backend == "nccl":
        # The master says when a peer is lost; NCCL's own watchdog would end the survivors, and their state with them.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    host, port = split_address(config.addresses.rendezvous)
    # Long, because a slow peer is no lost one.
    timeout = timedelta(seconds=config.startup_timeout_seconds)
    group = AbortableProcessGroup(backend=backend, others=frozenset({split_address(config.addresses.control)[1]}))
    try:
        with control.changed:
            if rank.round is not this_round:
                raise BrokenGroup("the round was over before the group was made")
            rank.group = group
        try:
            store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
            dist.init_process_group(
                backend,
                store=PrefixStore(f"generation-{this_round.number}", store),
                rank=index,
                world_size=config.world_size,
                timeout=timeout,
            )
        except (RuntimeError, ValueError) as error:  # DistNetworkError, DistStoreError, and gloo's plain RuntimeError
            raise BrokenGroup(error) from None
        group.complete()
        yield group
    except BaseException:
        # Not after the last step: a neighbour may still read what it needs to be done, too.
        group.cut()
        raise
    finally:
        with control.changed:
            rank.group = None
        group.leave()


def _outlive(group: dist.ProcessGroup, works: list[Work]) -> None:
    """Holds a group until its operations have ended, as they do after its time-out."""
    for work in works:
        with contextlib.suppress(RuntimeError):
            work.wait()


def _abort(group: dist.ProcessGroup) -> None:
    with contextlib.suppress(RuntimeError):  # it is aborted already
        group.abort()


def _sockets() -> set[int]:
    """The inodes of this process's sockets. Empty where there is no /proc: there, lost peers end a group by its time-out only."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(_FDS):
            with contextlib.suppress(OSError):  # closed meanwhile
                status = os.stat(f"{_FDS}/{name}")
                if stat.S_ISSOCK(status.st_mode):
                    found.add(status.st_ino)
    return found


def _shut(inode: int, others: frozenset[int]) -> None:
    """Shuts one down, when it is connected: gloo does not survive it on the one that it listens on."""
    for name in os.listdir(_FDS):
        with contextlib.suppress(OSError):
            if os.stat(f"{_FDS}/{name}").st_ino != inode:
                continue
            # A copy: the number may belong to another socket by the time of the call.
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if os.fstat(copy.fileno()).st_ino == inode and copy.getpeername()[1] not in others:
                    # What reads notices, and closes it. A write that met a closed connection would never learn of its end (`awaited`).
                    copy.shutdown(socket.SHUT_RD)
            return
