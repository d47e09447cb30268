"""Which parts of the contract this version does not carry out yet. Such a job is told so and gets no pods.

What can be judged by the spec alone and for ever is refused by the API server instead (api/spec.py).
"""

from collections.abc import Callable

from disttrain.api.spec import DistTrainJobSpec, Gang, Sharding, StrategyType, Tls

_UNSUPPORTED: tuple[tuple[str, Callable[[DistTrainJobSpec], bool]], ...] = (
    ("strategy.type ModelParallel", lambda s: s.strategy.type is StrategyType.MODEL_PARALLEL),
    ("strategy.type Hybrid", lambda s: s.strategy.type is StrategyType.HYBRID),
    (
        "strategy.dataParallel.sharding other than Replicated",
        lambda s: s.strategy.data_parallel is not None and s.strategy.data_parallel.sharding is not Sharding.REPLICATED,
    ),
    (
        "strategy.parameterServer.backupWorkers",
        lambda s: s.strategy.parameter_server is not None and s.strategy.parameter_server.backup_workers > 0,
    ),
    (
        "strategy.parameterServer.replication above 1",
        lambda s: s.strategy.parameter_server is not None and s.strategy.parameter_server.replication > 1,
    ),
    ("data.partitions", lambda s: s.data is not None and s.data.partitions is not None),
    ("data.replication above 1", lambda s: s.data is not None and s.data.replication > 1),
    ("data.encryption", lambda s: s.data is not None and s.data.encryption is not None),
    ("worker.elastic", lambda s: s.worker.elastic is not None),
    (
        "scheduling.gang Coscheduling, Volcano or Kueue",
        lambda s: s.scheduling.gang in (Gang.COSCHEDULING, Gang.VOLCANO, Gang.KUEUE),
    ),
    ("scheduling.topologyKey", lambda s: s.scheduling.topology_key != ""),
    ("network.tls Mutual", lambda s: s.network.tls is Tls.MUTUAL),
)


def unsupported(spec: DistTrainJobSpec) -> tuple[str, ...]:
    """The fields that ask for what this version cannot do, in the order of the spec."""
    return tuple(field for field, asks_for in _UNSUPPORTED if asks_for(spec))
