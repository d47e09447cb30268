"""A process group for one generation of the world: made under its own store prefix, with a time-out, and left without waiting.

Not here: when a world begins and ends (the master), and what travels in it (reduce.py, state.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # missing in their __all__

from disttrain.api.runtime import JobConfig
from disttrain_trainer.address import split_address


class BrokenGroup(Exception):
    """A peer, or the way to it, is lost: this world is over."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error).strip().split("\n")[0])


@contextmanager
def process_group(config: JobConfig, *, generation: int, rank: int, backend: str) -> Iterator[None]:
    """The default group of this generation; a group of one needs none. Raises BrokenGroup when the peers do not come together.

    Every wait in it ends after the peer timeout: a frozen peer must not be waited for half an hour, torch's default.
    """
    if config.world_size == 1:
        yield
        return
    host, port = split_address(config.addresses.rendezvous)
    timeout = timedelta(seconds=config.peer_timeout_seconds)
    try:
        store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        dist.init_process_group(
            backend,
            store=PrefixStore(f"generation-{generation}", store),
            rank=rank,
            world_size=config.world_size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:  # DistNetworkError, DistStoreError, and gloo's plain RuntimeError
        _leave()
        raise BrokenGroup(error) from None
    try:
        yield
    finally:
        _leave()


def _leave() -> None:
    if dist.is_initialized():
        # abort before destroy: a peer may be gone, and nothing must wait for it.
        group = dist.group.WORLD
        if group is not None:
            group.abort()
        dist.destroy_process_group()
