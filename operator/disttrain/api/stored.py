"""A job as the API server stores it, read by a version that may be older or newer than the one that wrote it.

A spec of which a value is not understood must not be run: the job would train something else than was asked. Such a job is left as it is.
The same holds where the status does not say for sure whether the job is finished, or what was counted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from disttrain.api.base import Model
from disttrain.api.code import of_older_release
from disttrain.api.job import DistTrainJob, Metadata
from disttrain.api.policies import CleanPodPolicy, RunPolicy
from disttrain.api.reading import NotReadable, Read, read, sentences
from disttrain.api.reasons import ConditionType
from disttrain.api.spec import DistTrainJobSpec
from disttrain.api.status import DistTrainJobStatus

M = TypeVar("M", bound=Model)

FINAL: Final = (ConditionType.COMPLETE, ConditionType.FAILED)
_DECISIVE: Final = frozenset(
    {
        *(f"conditions.{type_}" for type_ in (*FINAL, ConditionType.SUSPENDED)),
        *("attempt", "startTime", "completionTime", "worker.completedIndexes", "training.lastCheckpoint"),
        *(f"restarts.{field}" for field in ("total", "countedTowardsLimit", "checkpointStep", "accounted")),
    }
)
"""Parts of the status without which a decision could run work a second time, or count twice. Everything else is seen again."""
_NAMELESS: Final = re.compile(r"conditions\.[0-9]")
"""A condition that does not say for sure which it is could be one of these."""
_NO_SPEC: Final = {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["true"]}}
"""In the place of a spec that is not understood; nothing is ever made of it."""


@dataclass(frozen=True, slots=True)
class ReadJob:
    """What was read of a job."""

    job: DistTrainJob
    """Its spec is the stored one only when `not_understood` is empty; else it holds no more than what a finished job needs."""
    unknown: tuple[str, ...]
    """Fields that this version does not know, and without which it runs the job."""
    not_understood: tuple[str, ...]
    """Why this version must not touch the job: which fields, and what is wrong with each."""


def read_stored(body: dict[str, Any]) -> ReadJob:
    """The job of a stored object. Raises NotReadable only where its metadata cannot be read."""
    metadata = read(Metadata, body.get("metadata"))
    spec, of_spec = _read(DistTrainJobSpec, _of_today(body.get("spec")))
    status, of_status = _read(DistTrainJobStatus, body.get("status") or {})
    not_understood = [f"spec.{reason}" for reason in of_spec]
    if status is None:
        not_understood += [f"status.{reason}" for reason in of_status]
    else:
        not_understood += [f"status.{reason}" for reason in sentences(_decisive(status.unreadable))]
        if status.value.completion_time and not any(map(status.value.is_true, FINAL)):
            not_understood.append("status.conditions: the job has a completionTime, and is neither Complete nor Failed")
    parts: dict[str, Any] = {
        "metadata": metadata.value,
        "spec": spec.value if spec and not not_understood else _spec_of_the_end(body.get("spec")),
        "status": status.value if status else DistTrainJobStatus(),
    }
    try:
        job = DistTrainJob(**parts)
    except ValidationError as error:  # a rule of the whole object
        not_understood += [problem["msg"] for problem in error.errors()]
        job = DistTrainJob.model_construct(**parts)
    unknown = [f"spec.{path}" for path in spec.unknown] if spec else []
    unknown += [f"status.{path}" for path in status.unknown] if status else []
    return ReadJob(job, tuple(unknown), tuple(not_understood))


def _of_today(spec: Any) -> Any:
    """The spec with what an earlier release wrote elsewhere in its place of today."""
    return (
        {**spec, "trainer": of_older_release(spec["trainer"])} if isinstance(spec, dict) and "trainer" in spec else spec
    )


def _read(model: type[M], data: Any) -> tuple[Read[M] | None, tuple[str, ...]]:
    """What can be read, None for nothing; and what was not understood, one sentence each."""
    try:
        found = read(model, data)
    except NotReadable as error:
        return None, error.reasons
    return found, sentences(found.unreadable)


def _decisive(unreadable: Mapping[str, str]) -> dict[str, str]:
    """Of what could not be read of a status, what a decision would need: a part of `_DECISIVE`, or something that holds one."""
    return {
        path: why
        for path, why in unreadable.items()
        if _NAMELESS.match(path)
        or any(f"{path}.".startswith(f"{part}.") or f"{part}.".startswith(f"{path}.") for part in _DECISIVE)
    }


def _spec_of_the_end(spec: Any) -> DistTrainJobSpec:
    """A spec with which a finished job is cleaned up and one day deleted, as far as its own says so for sure."""
    stored = spec.get("runPolicy") if isinstance(spec, dict) else None
    policy, _ = _read(RunPolicy, {} if stored is None else stored)
    kept = policy.value if policy else RunPolicy()
    if policy is None or "cleanPodPolicy" in policy.unreadable:
        kept = kept.model_copy(update={"clean_pod_policy": CleanPodPolicy.NONE})
    return DistTrainJobSpec.model_validate(_NO_SPEC).model_copy(update={"run_policy": kept})
