"""The configuration of a training process, from the spec of its job."""

from collections.abc import Mapping
from typing import Any

from disttrain.api.runtime import Addresses, JobConfig
from disttrain.api.spec import DistTrainJobSpec


def config_of(spec: Mapping[str, Any], **others: Any) -> JobConfig:
    """The configuration of a job's first attempt. By default no process listens at its addresses. others: further fields of it."""
    read = DistTrainJobSpec.model_validate(spec)
    fields = {
        "namespace": "default",
        "name": "job",
        "uid": "u",
        "attempt": 1,
        "tls": read.network.tls,
        "strategy": read.strategy,
        "trainer": read.trainer,
        "checkpoint": read.checkpoint,
        "data": read.data,
        "workers": read.worker.most,
        "min_workers": read.worker.elastic.min_replicas if read.worker.elastic is not None else None,
        "processes_per_worker": read.processes_per_worker,
        "parameter_servers": read.servers,
        "addresses": Addresses(control="h:1", rendezvous="h:2", parameter_servers=("h:3",) * read.servers),
    }
    return JobConfig(**fields | others)
