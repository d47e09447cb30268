"""The DistTrainJob itself: metadata, spec, status. Not here: the fields (spec.py, status.py)."""

import re
from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.alias_generators import to_camel

from disttrain.api.base import Model, Rule
from disttrain.api.names import MAX_JOB_NAME
from disttrain.api.spec import DistTrainJobSpec
from disttrain.api.status import DistTrainJobStatus

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

NAME_RULE = Rule(
    cel=f"self.metadata.name.size() <= {MAX_JOB_NAME} && self.metadata.name.matches('^{_NAME.pattern}$')",
    check=lambda job: len(job.metadata.name) <= MAX_JOB_NAME and _NAME.fullmatch(job.metadata.name) is not None,
    message=f"must be an RFC 1035 label of at most {MAX_JOB_NAME} characters (lower case letters, digits, '-', a letter first): "
    "it becomes a Service name, and <name>-<role>-<index> must fit in 63",
    field="metadata.name",
    shows="metadata.name",
)


class Metadata(Model):
    """The part of ObjectMeta that DistTrain reads; the rest is kept."""

    model_config = ConfigDict(extra="allow", frozen=True, alias_generator=to_camel, populate_by_name=True)

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    resource_version: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class DistTrainJob(Model):
    """A distributed training job: a master, parameter servers and workers, run to completion."""

    RULES = (NAME_RULE,)

    api_version: Literal["disttrain.dev/v1alpha1"] = "disttrain.dev/v1alpha1"
    kind: Literal["DistTrainJob"] = "DistTrainJob"
    metadata: Metadata
    spec: DistTrainJobSpec
    status: DistTrainJobStatus = DistTrainJobStatus()

    @classmethod
    def parse(cls, body: dict[str, Any]) -> "DistTrainJob":
        """The job of an object as the API server or a file gives it. Raises pydantic.ValidationError."""
        # By its outer names alone: the API server knows no run_policy.
        return cls.model_validate(body, by_alias=True, by_name=False)
