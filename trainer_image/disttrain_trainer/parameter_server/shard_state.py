"""What a server says of its shards at one moment."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from disttrain_trainer.data.index_set import IndexSet


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """A shard, or all those together of which a server is the primary."""

    round_number: int = 0
    """0 before the first one."""
    version: int = 0
    """Optimiser steps behind the parameters; Sync: steps."""
    applied: IndexSet = field(default_factory=IndexSet)
    """The parts that count here. Sync: with those of the step that is still incomplete."""
    max_staleness_seen: int = 0
    """Largest lead over the slowest live worker with which an iteration started."""
    staleness: int | None = None
    """Iterations by which the fastest live worker is ahead of the slowest now; None where workers wait for one another (Sync)."""
    late_gradients: int = 0
    """Gradients that were ignored because their part counted already; of a server those of all its rounds."""
    ahead: int = 0
    """Versions by which the newest of several shards is ahead of the oldest, whose `version` this is."""
    initialized: bool = False
    """Whether the parameters have values."""
    shard_bytes: int = 0
    """Size of the parameters, without optimiser state."""
    wait_seconds: float = 0.0
    """Time that workers have waited for others, or for the first parameters, summed over workers."""
    workers: tuple[int, ...] = ()
    """Ranks of the workers that are connected."""
    gradient_norms: tuple[tuple[int, float], ...] = ()
    """Sync: versions, and the squared norm of this server's part of the gradient that led to them; see gradient_norm.py."""
    bytes_in: int = 0
    bytes_out: int = 0


def together(states: Sequence[ShardState]) -> ShardState:
    """The shards of one server as one: what all of them have, and the sum of what each does."""
    if len(states) <= 1:
        return states[0] if states else ShardState()
    norms = [dict(state.gradient_norms) for state in states]
    common = sorted(set.intersection(*map(set, norms)))
    return replace(
        states[0],
        version=min(state.version for state in states),
        ahead=max(state.version for state in states) - min(state.version for state in states),
        applied=reduce(IndexSet.intersection, (state.applied for state in states)),
        max_staleness_seen=max(state.max_staleness_seen for state in states),
        late_gradients=sum(state.late_gradients for state in states),
        initialized=all(state.initialized for state in states),
        shard_bytes=sum(state.shard_bytes for state in states),
        wait_seconds=math.fsum(state.wait_seconds for state in states),
        workers=tuple(sorted({rank for state in states for rank in state.workers})),
        gradient_norms=tuple((version, math.fsum(one[version] for one in norms)) for version in common),
    )
