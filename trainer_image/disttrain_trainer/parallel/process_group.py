"""The process groups of one round: made under its own prefix in the store, and left without waiting.

A wait ends when a peer is lost, not after a time: a closed connection ends it, and `end` ends it from another thread, so that a rank that
waits for a frozen peer goes on when the master ends the round. A peer that is only slow, because it writes a checkpoint or has more to
compute, is waited for.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore, Work  # type: ignore[attr-defined]  # not in their __all__
from torch.distributed import distributed_c10d as c10d

from disttrain.api.runtime import JobConfig
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Group, Round
from disttrain_trainer.net.transport import PLAIN, Transport
from disttrain_trainer.parallel import abort, backend
from disttrain_trainer.parallel.backend import BrokenGroup, EndableBackend, RoundEnd
from disttrain_trainer.parallel.rendezvous_store import RendezvousStore
from disttrain_trainer.parallel.traffic import Traffic
from disttrain_trainer.parallel.wire_backend import WireBackend
from disttrain_trainer.runtime import logs, machine
from disttrain_trainer.runtime.sockets import split_address

log = logs.get_logger(__name__)

T = TypeVar("T")
B = TypeVar("B", bound="RoundBackend")

_SUM: Final = dist.AllreduceOptions()
_LOOK_SECONDS: Final = 0.005
"""Seconds between two looks at whether all ranks of a group are there."""
_QUIET_SECONDS: Final = 0.5
"""Seconds for operations that a closed connection ended: after that, what is left of them waits and computes nothing."""
_rounds: "list[AbortableProcessGroup]" = []
"""The round that this process is in, if any: torch calls `_create` without one."""


class RoundBackend(Protocol):
    """A group of a round, on gloo or on connections of ours."""

    def allreduce(self, tensors: list[torch.Tensor], options: dist.AllreduceOptions, /) -> Work: ...

    def close(self) -> None:
        """Ends every wait in it. Does not block."""

    def release(self) -> object:
        """Ends its threads. Blocks until then."""


class AbortableProcessGroup:
    """The groups of one round: the default group, and those that a model's mesh makes of it."""

    def __init__(
        self, traffic: Traffic | None = None, *, transport: Transport = PLAIN, host: str = "127.0.0.1"
    ) -> None:
        """transport: that of the job; gloo has the plain one only, so under TLS the connections are ours. host: the address of this
        machine that the peers reach, for these."""
        self._round_end = RoundEnd()
        self._traffic = traffic or Traffic()
        self._transport, self._host = transport, host
        self._lock = threading.Lock()
        self._backends: list[RoundBackend] = []
        self._store: Store | None = None

    @contextmanager
    def joined(
        self, name: str, *, store: Callable[[], Store], rank: int, size: int, timeout: timedelta
    ) -> Iterator[None]:
        """torch's default group of these ranks, within the context. Raises BrokenGroup when the peers do not come together.

        name: `gloo` or `nccl`. store: connects to the rendezvous; called in another thread, as it may wait. timeout: of the start, and
        of each operation: gloo and NCCL have one.
        """
        if name == "gloo":
            # The recorder keeps gloo's operations, for the debugging of hangs, and takes two microseconds for each.
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")
        _rounds.append(self)
        # torch names a group, and its keys in the store, by how many groups this process has begun to make since it last destroyed all.
        # After one that did not come together there is none to destroy: a new process would use other names, and the two would never meet.
        c10d._world.group_count = 0
        try:
            try:
                dist.init_process_group(
                    backend.NAME if name == "gloo" else name,
                    store=self._endable(lambda: self._opened(store())),
                    rank=rank,
                    world_size=size,
                    timeout=timeout,
                )
            except (
                RuntimeError,
                ValueError,
            ) as error:  # DistNetworkError, DistStoreError, and gloo's plain RuntimeError
                raise BrokenGroup(error) from None
            yield
        except BaseException:
            # Not after the last step: a neighbour may still read what it needs to be done, too.
            self._close()
            raise
        finally:
            _rounds.remove(self)
            self._leave()

    def all_reduce(self, tensor: torch.Tensor) -> Work:
        """Starts the sum of a tensor over all ranks, in place.

        Not by way of torch.distributed where it can be avoided: its layers take twice the time of the operation's start.
        """
        if self._backends:
            return self._backends[0].allreduce([tensor], _SUM)
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        return work

    def end(self) -> None:
        """Ends the waits of another thread in the groups. Does not block: NCCL's abort may take long, and has a thread of its own."""
        self._close()
        abort.start(abort.of_this_process())

    def create(self, options: Any) -> RoundBackend:
        """One more group, when torch asks for it. options: c10d's DistributedBackendOptions."""
        if self._transport is PLAIN:
            self._await_everyone(options, b"")
            return self._keep(self._endable(lambda: self._on_gloo(options)))
        made = WireBackend(
            rank=options.group_rank,
            size=options.group_size,
            transport=self._transport,
            host=self._host,
            timeout=options.timeout,
            round_end=self._round_end,
            traffic=self._traffic,
        )
        self._keep(made)
        places = self._await_everyone(options, made.place.encode())
        self._endable(lambda: made.connect([place.decode() for place in places]))
        return made

    def _on_gloo(self, options: Any) -> EndableBackend:
        gloo = ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)
        return EndableBackend(gloo, round_end=self._round_end, traffic=self._traffic)

    def _await_everyone(self, options: Any, own: bytes) -> list[bytes]:
        """Tells the other ranks of a group that this one is here, and what they need of it; returns what each has told.

        A peer that is lost before it comes is waited for here, where the end of the round is seen, and not within gloo.
        """
        store, size, timeout = options.store, options.group_size, options.timeout
        store.set(f"here/{options.group_rank}", own)
        everyone = [f"here/{number}" for number in range(size)]
        last = time.monotonic() + timeout.total_seconds()
        while not store.check(everyone):
            self._round_end.check()
            if time.monotonic() > last:
                raise BrokenGroup(f"not all of {size} ranks came within {timeout.total_seconds():g} s")
            time.sleep(_LOOK_SECONDS)
        return [store.get(key) for key in everyone]

    def _keep(self, made: B) -> B:
        with self._lock:
            self._backends.append(made)
        if self._round_end.reached:
            made.close()
        return made

    def _opened(self, store: Store) -> Store:
        """Keeps the store: torch's C++ finds one that is written in Python only while a reference in Python lives."""
        self._store = store
        if self._round_end.reached:
            self._close_store()
        return store

    def _close_store(self) -> None:
        if isinstance(self._store, RendezvousStore):
            self._store.close()

    def _endable(self, make: Callable[[], T]) -> T:
        """What `make` returns or raises, from a thread that is left alone when the round ends."""
        made: list[T] = []
        errors: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            try:
                made.append(make())
            except BaseException as error:
                errors.append(error)
            done.set()

        self._round_end.check()
        threading.Thread(target=run, name="rendezvous", daemon=True).start()
        while not done.wait(0.05):
            self._round_end.check()
        if errors:
            raise errors[0]
        return made[0]

    def _close(self) -> None:
        self._round_end.reach()
        with self._lock:
            backends = list(self._backends)
        for one in backends:
            one.close()
        self._close_store()

    def _leave(self) -> None:
        """Leaves the groups without waiting for another rank."""
        self._close_store()
        if not dist.is_initialized():
            return
        # Before destroy: a peer may be gone, and nothing must wait for it.
        if not abort.finish(abort.start(abort.of_this_process())):
            log.warning("a group of NCCL does not end; its memory is not given back")
        dist.destroy_process_group()
        # gloo's groups wait for their threads. Those end with the connections, or, where gloo does not let go, with its time-out.
        releases = [threading.Thread(target=one.release, name="release", daemon=True) for one in self._backends]
        for release in releases:
            release.start()
        last = time.monotonic() + _QUIET_SECONDS
        for release in releases:
            release.join(max(0.0, last - time.monotonic()))


@contextmanager
def process_group(
    config: JobConfig,
    *,
    control: ControlClient,
    member: CollectiveMember,
    this_round: Round,
    rank: int,
    size: int,
    backend: str,
    traffic: Traffic,
    transport: Transport = PLAIN,
) -> Iterator[AbortableProcessGroup | None]:
    """The default group of this round; a group of one needs none. Raises BrokenGroup when the peers do not come together.

    rank, size: this process's place in the round, and how many take part. While it lives, `member.group` is how the control thread ends it.
    """
    if size == 1:
        yield None
        return
    with group_at(
        config,
        control=control,
        member=member,
        is_over=lambda: member.round is not this_round,
        prefix=f"generation-{this_round.number}",
        rank=rank,
        size=size,
        backend=backend,
        traffic=traffic,
        transport=transport,
    ) as group:
        yield group


class GroupHolder(Protocol):
    """Has the group in which the main thread may wait, for the control thread, which ends it."""

    group: Group | None


@contextmanager
def group_at(
    config: JobConfig,
    *,
    control: ControlClient,
    member: GroupHolder,
    is_over: Callable[[], bool],
    prefix: str,
    rank: int,
    size: int,
    backend: str,
    traffic: Traffic,
    transport: Transport = PLAIN,
) -> Iterator[AbortableProcessGroup]:
    """The default group of the ranks that meet under a prefix of the master's store. Raises BrokenGroup when they do not come together.

    is_over: called with `control.changed` held, before the group is made.
    """
    if backend == "nccl":
        # The master says when a peer is lost; NCCL's own watchdog would end the survivors, and their state with them.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    host, port = split_address(config.addresses.rendezvous)
    # Long, because a slow peer is no lost one.
    timeout = timedelta(seconds=config.startup_timeout_seconds)
    group = AbortableProcessGroup(traffic, transport=transport, host=machine.address_toward(host) or host)

    def store() -> Store:
        if transport is not PLAIN:
            return RendezvousStore(transport, config.addresses.rendezvous, prefix=prefix, timeout=timeout)
        connected = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        return PrefixStore(prefix, connected)

    try:
        with control.changed:
            if is_over():
                raise BrokenGroup("the round was over before the group was made")
            member.group = group
        with group.joined(backend, store=store, rank=rank, size=size, timeout=timeout):
            yield group
    finally:
        with control.changed:
            member.group = None


def _create(options: Any, _: Any) -> RoundBackend:
    if not _rounds:
        raise RuntimeError("no round is under way: a group can be made within one only")
    return _rounds[-1].create(options)


backend.register(_create)
