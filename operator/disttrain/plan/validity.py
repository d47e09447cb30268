"""Which parts of the contract this version does not carry out yet. The condition Valid of such a job says so, and it gets no pods.

What can be judged by the spec alone and for ever is refused by the API server instead (api/spec.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from disttrain.api.policies import Gang, Scheduling
from disttrain.api.spec import DistTrainJobSpec
from disttrain.api.strategy import ParameterServerStrategy
from disttrain.api.trainer import Loop

Path: TypeAlias = tuple[str, ...]
"""The camelCase keys of a field, from spec downwards."""


@dataclass(frozen=True, slots=True)
class Unsupported:
    """What this version cannot do: where it stands in the spec, in words, and whether a spec asks for it."""

    path: Path
    words: str
    asked_for: Callable[[DistTrainJobSpec], bool]
    local: bool = False
    """Whether a local run carries it out, so that only a cluster does not."""


UNSUPPORTED = (
    Unsupported(
        ("strategy", "parameterServer", "replication"),
        "strategy.parameterServer.replication above 2",
        lambda s: isinstance(s.strategy.exchange, ParameterServerStrategy) and s.strategy.exchange.replication > 2,
    ),
    Unsupported(
        # Not a rule of the API server: CEL sees no field that has no type (api/origin.py).
        ("checkpoint", "from"),
        "checkpoint.from of a script or command",
        lambda s: s.checkpoint is not None and s.checkpoint.from_ is not None and not isinstance(s.trainer.work, Loop),
    ),
    Unsupported(
        ("worker", "elastic"),
        "worker.elastic on a cluster",
        lambda s: s.worker.elastic is not None and not s.strategy.is_sharded,
        local=True,
    ),
    Unsupported(
        # A rank that joins or leaves changes what part of the model each other one holds.
        ("worker", "elastic"),
        "worker.elastic of a model that is cut over its workers",
        lambda s: s.worker.elastic is not None and s.strategy.is_sharded,
    ),
    Unsupported(
        ("scheduling", "gang"),
        "scheduling.gang Coscheduling, Volcano or Kueue",
        lambda s: s.scheduling.gang in (Gang.COSCHEDULING, Gang.VOLCANO, Gang.KUEUE),
    ),
    Unsupported(
        ("scheduling", "timeoutSeconds"),
        f"scheduling.timeoutSeconds other than {Scheduling().timeout_seconds}",
        lambda s: s.scheduling.timeout_seconds != Scheduling().timeout_seconds,
    ),
    Unsupported(("scheduling", "topologyKey"), "scheduling.topologyKey", lambda s: s.scheduling.topology_key != ""),
)


def unsupported(spec: DistTrainJobSpec, *, local: bool = False) -> tuple[str, ...]:
    """What the spec asks for and this version cannot do, in words, in the order of the spec. local: in a local run."""
    return tuple(words for _, words in unsupported_fields(spec, local=local))


def unsupported_fields(spec: DistTrainJobSpec, *, local: bool = False) -> tuple[tuple[Path, str], ...]:
    """The same with the place of each field, for a caller that can point at it."""
    return tuple(
        (entry.path, entry.words) for entry in UNSUPPORTED if entry.asked_for(spec) and not (local and entry.local)
    )


def idle_workers(spec: DistTrainJobSpec, parts_per_step: int | None = None) -> str:
    """What is said of workers that have no part of a step; "" where each has one, or takes parts of the next steps (Async).

    parts_per_step: that of a job that has begun, where trainer.partsPerStep does not name it.
    """
    parts, in_steps = spec.trainer.parts_per_step or parts_per_step, spec.strategy.synchronous
    members = spec.default_parts_per_step  # of an elastic job with its most workers
    if not isinstance(spec.trainer.work, Loop) or parts is None or members <= parts or not in_steps:
        return ""
    return (
        f"{members - parts} of {members} worker processes have nothing to do in a step: it has {parts} "
        f"part{'' if parts == 1 else 's'} (trainer.partsPerStep)"
    )
