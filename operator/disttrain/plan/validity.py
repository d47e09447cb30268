"""Which parts of the contract this version does not carry out yet. The condition Valid of such a job says so, and it gets no pods.

What can be judged by the spec alone and for ever is refused by the API server instead (api/spec.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from disttrain.api.gangs import GANG_SCHEDULERS, may_be_gang, named_schedulers
from disttrain.api.policies import Gang, Scheduling
from disttrain.api.spec import DistTrainJobSpec
from disttrain.api.strategy import CompressionType, ParameterServerStrategy, StrategyType
from disttrain.api.trainer import Loop

Path: TypeAlias = tuple[str, ...]
"""The camelCase keys of a field, from spec downwards."""


@dataclass(frozen=True, slots=True)
class Unsupported:
    """What this version cannot do: where it stands in the spec, in words, and whether a spec asks for it."""

    path: Path
    words: str
    asked_for: Callable[[DistTrainJobSpec], bool]


def _not_by_groups(*path: str, asked_for: Callable[[DistTrainJobSpec], bool]) -> Unsupported:
    """A field that groups of processes which share a model do not carry out with parameter servers."""
    return Unsupported(
        path,
        f"{'.'.join(path)} with strategy.type Hybrid and parameterServer",
        lambda s: s.strategy.model_parallel is not None and s.strategy.parameter_server is not None and asked_for(s),
    )


def _served(asked_for: Callable[[ParameterServerStrategy], bool]) -> Callable[[DistTrainJobSpec], bool]:
    return lambda s: s.strategy.parameter_server is not None and asked_for(s.strategy.parameter_server)


_USUAL_TIMEOUT = Scheduling().timeout_seconds

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
        # A copy of a shard learns of no step without gradients.
        ("trainer", "nanPolicy"),
        "trainer.nanPolicy with strategy.parameterServer.replication above 1",
        lambda s: (
            s.trainer.nan_policy is not None
            and isinstance(s.strategy.exchange, ParameterServerStrategy)
            and s.strategy.exchange.replication > 1
        ),
    ),
    Unsupported(
        # Their checkpoints and their evaluations are not of one version.
        ("checkpoint", "keepBest"),
        "checkpoint.keepBest with consistency Async or BoundedStaleness",
        lambda s: s.checkpoint is not None and s.checkpoint.keep_best is not None and not s.strategy.synchronous,
    ),
    Unsupported(
        # A rank that joins while the others evaluate has once ended the job, and it is not known why.
        ("trainer", "evaluateEverySteps"),
        "trainer.evaluateEverySteps with worker.elastic and DataParallel",
        lambda s: (
            s.trainer.evaluate_every_steps > 0
            and s.worker.elastic is not None
            and s.strategy.type is StrategyType.DATA_PARALLEL
        ),
    ),
    Unsupported(
        # A rank that joins or leaves changes what part of the model each other one holds.
        ("worker", "elastic"),
        "worker.elastic of a model that is cut over its workers",
        lambda s: s.worker.elastic is not None and s.strategy.is_sharded,
    ),
    _not_by_groups(
        "strategy", "parameterServer", "backupWorkers", asked_for=_served(lambda served: served.backup_workers > 0)
    ),
    _not_by_groups(
        "strategy", "parameterServer", "localSteps", asked_for=_served(lambda served: served.local_steps > 1)
    ),
    _not_by_groups(
        "strategy",
        "parameterServer",
        "compression",
        asked_for=_served(lambda served: served.compression.type is not CompressionType.NONE),
    ),
    Unsupported(
        ("scheduling", "gang"),
        "scheduling.gang Kueue or Native",
        lambda s: s.scheduling.gang in (Gang.KUEUE, Gang.NATIVE),
    ),
    Unsupported(
        ("scheduling", "gang"),
        "scheduling.gang of pods with different schedulerName",
        lambda s: s.scheduling.gang in GANG_SCHEDULERS and len(named_schedulers(s)) > 1,
    ),
    Unsupported(
        ("scheduling", "timeoutSeconds"),
        f"scheduling.timeoutSeconds other than {_USUAL_TIMEOUT} without worker.elastic or a gang",
        lambda s: s.scheduling.timeout_seconds != _USUAL_TIMEOUT and s.worker.elastic is None and not may_be_gang(s),
    ),
)


def unsupported(spec: DistTrainJobSpec) -> tuple[str, ...]:
    """What the spec asks for and this version cannot do, in words, in the order of the spec."""
    return tuple(words for _, words in unsupported_fields(spec))


def unsupported_fields(spec: DistTrainJobSpec) -> tuple[tuple[Path, str], ...]:
    """The same with the place of each field, for a caller that can point at it."""
    return tuple((entry.path, entry.words) for entry in UNSUPPORTED if entry.asked_for(spec))


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
