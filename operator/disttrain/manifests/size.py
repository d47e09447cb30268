"""Whether the configuration of a job can be handed to a process at all. Linux takes no single string of an environment above 128 KiB.

No schema can tell: trainer.config is the user's own, and what counts are the bytes of the JSON that DISTTRAIN_JOB carries.
"""

from dataclasses import dataclass
from typing import Any, Final

from disttrain.api.job import DistTrainJob
from disttrain.api.runtime import JobConfig
from disttrain.manifests.environment import cluster_addresses, job_config

MAX_BYTES: Final = 100 * 1024
"""Of DISTTRAIN_JOB. The remaining part of the 128 KiB is for what later versions of the operator add."""


@dataclass(frozen=True, slots=True)
class TooLarge:
    """What is too large, and the field to blame: the largest part."""

    path: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.message}"


def too_large(job: DistTrainJob) -> TooLarge | None:
    """What makes the configuration too large for a process, None when it is not. Pure."""
    config = job_config(job, 1, cluster_addresses(job))
    size = _size(config)
    if size <= MAX_BYTES:
        return None
    script = config.trainer.script
    parts = {
        ("spec", "trainer", "config"): (_without(config, "config", None), "read large settings from a file or volume"),
        ("spec", "trainer", "command"): (_without(config, "command", None), "put long arguments into a file"),
        ("spec", "trainer", "script", "args"): (
            _without(config, "script", script.model_copy(update={"args": ()}) if script is not None else None),
            "put long arguments into a file",
        ),
        ("spec", "parameterServer", "replicas"): (
            config.model_copy(update={"addresses": config.addresses.model_copy(update={"parameter_servers": ()})}),
            "their addresses are part of it; take fewer servers, or a shorter name of the job",
        ),
        ("spec", "worker", "replicas"): (
            config.model_copy(update={"addresses": config.addresses.model_copy(update={"copies": ()})}),
            "with data.replication their addresses are part of it; take fewer workers, or leave data.replication out",
        ),
    }
    saved = {path: size - _size(lighter) for path, (lighter, _) in parts.items()}
    path = max(saved, key=lambda path: saved[path])
    message = (
        f"the configuration of a training process has {size} bytes, {saved[path]} of them from here; "
        f"a process can be handed at most {MAX_BYTES}: {parts[path][1]}"
    )
    return TooLarge(path, message)


def _size(config: JobConfig) -> int:
    return len(config.model_dump_json(by_alias=True, exclude_none=True).encode())


def _without(config: JobConfig, field: str, value: Any) -> JobConfig:
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={field: value})})
