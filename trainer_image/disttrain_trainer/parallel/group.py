"""A process group for one generation of the world: made under its own store prefix, with a time-out, and left without waiting.

Not here: when a world begins and ends (the master), and what travels in it (data.py).
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from disttrain.api.runtime import JobConfig
from disttrain_trainer.address import split_address

log = logging.getLogger(__name__)

_MARKS = (
    "gloo/",
    "nccl",
    "process group",
    "connection closed by peer",
    "connection reset by peer",
    "tcpstore",
    "broken pipe",
)
"""Words in the errors of a broken group. torch raises a plain RuntimeError for gloo's, and DistBackendError for NCCL's."""


def is_broken_group(error: BaseException) -> bool:
    """Whether an error says that a peer, or the way to it, is lost; any other error is the user's."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in _MARKS)


@contextmanager
def process_group(config: JobConfig, *, generation: int, rank: int, backend: str) -> Iterator[None]:
    """The default group of this generation. A group of one needs none.

    Every wait in it ends after the peer timeout. Raises RuntimeError when the peers do not come together.
    """
    if config.world_size == 1:
        yield
        return
    host, port = split_address(config.addresses.rendezvous)
    timeout = timedelta(seconds=config.peer_timeout_seconds)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"generation-{generation}", store),
            rank=rank,
            world_size=config.world_size,
            timeout=timeout,
        )
        yield
    finally:
        if dist.is_initialized():
            # abort and not only destroy: a peer may be gone, and nothing must wait for it.
            group = dist.group.WORLD
            if group is not None:
                group.abort()
            dist.destroy_process_group()
        gc.collect()  # a DDP of the old group keeps hooks on the parameters until it is gone
