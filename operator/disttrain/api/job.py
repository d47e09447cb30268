"""The DistTrainJob itself: metadata, spec, status. Not here: the fields (spec.py, status.py)."""

import re
from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

from disttrain.api.base import Model, Rule
from disttrain.api.names import MAX_JOB_NAME
from disttrain.api.spec import DistTrainJobSpec
from disttrain.api.status import DistTrainJobStatus
from disttrain.api.trainer import Trainer

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

NAME_RULE = Rule(
    cel=f"self.metadata.name.size() <= {MAX_JOB_NAME} && self.metadata.name.matches('^{_NAME.pattern}$')",
    check=lambda job: len(job.metadata.name) <= MAX_JOB_NAME and _NAME.fullmatch(job.metadata.name) is not None,
    message=f"must be an RFC 1035 label of at most {MAX_JOB_NAME} characters (lower case letters, digits, '-', a letter first): "
    "it becomes a Service name, and <name>-<role>-<index> must fit in 63",
    field="metadata.name",
    shows="metadata.name",
)

_FIXED_WHILE_RUNNING = (
    "image",
    "trainer",
    "data",
    "checkpoint",
    "worker.gpusPerWorker",
    "worker.template",
    "master.template",
    "parameterServer.template",
)
"""What running pods must agree on, or were made of: a pod that is replaced is made of the spec as it is then."""

# spec.suspend alone does not say that the pods are gone. Suspended, changed and resumed before the operator looks, a job would keep
# pods of the old spec beside replacements of the new one. As KEP-5440 has it for a batch Job.
_IS_SUSPENDED = (
    "oldSelf.spec.suspend && has(oldSelf.status) && has(oldSelf.status.conditions) && "
    "oldSelf.status.conditions.exists(c, c.type == 'Suspended' && c.status == 'True')"
)


def _same(field: str) -> str:
    """CEL: a field, which may be absent, is as it was. What it is in may be absent only where a rule of its own fixes that."""
    new, old = f"self.spec.{field}", f"oldSelf.spec.{field}"
    part = field.rpartition(".")[0]
    given = f"!has(self.spec.{part}) || !has(oldSelf.spec.{part}) || " if part else ""
    return f"({given}has({new}) == has({old}) && (!has({new}) || {new} == {old}))"


def _readable(optimizer: str) -> str:
    """CEL: whether an optimizer holds numbers only. Release 0.1.0 stored strings, and CEL cannot read a string in a field of type number:
    such an optimizer does not even equal itself. `==` is an error then, `in` is false (docs/design/0002)."""
    return f"{optimizer} in [{optimizer}]"


def _same_trainer() -> str:
    """CEL: the trainer is as it was. One with strings is compared field by field, without its optimizer: the API server takes such an
    optimizer only as long as nothing in it changes (optimizer.Optimizer.RULES)."""
    new, old = "self.spec.trainer", "oldSelf.spec.trainer"

    def same(name: str, info: FieldInfo) -> str:
        equal = f"{new}.{name} == {old}.{name}"
        if info.default is not None:  # so that the API server has set it
            return equal
        return f"has({new}.{name}) == has({old}.{name}) && (!has({new}.{name}) || {equal})"

    fields = [info for name, info in Trainer.model_fields.items() if name != "optimizer"]
    others = " && ".join(same(str(info.alias), info) for info in fields)
    strings = f"has({new}.optimizer) && !({_readable(f'{new}.optimizer')})"
    return f"({new} in [{old}] || ({strings} && {others}))"


EDIT_RULES = tuple(
    Rule(
        cel=f"{_same_trainer() if field == 'trainer' else _same(field)} || ({_IS_SUSPENDED})",
        check=None,
        message="is immutable while the job runs; suspend it first, and wait for its condition Suspended",
        field=f"spec.{field}",
        shows=f"spec.{field}" if field in ("image", "worker.gpusPerWorker") else "",
    )
    for field in _FIXED_WHILE_RUNNING
)

WORKERS_RULE = Rule(
    cel=f"{_same('worker.replicas')} || has(self.spec.worker.elastic) || ({_IS_SUSPENDED})",
    check=None,
    message="changes only within elastic, or while the job is suspended: suspend it first, and wait for its condition Suspended",
    field="spec.worker.replicas",
    shows="spec.worker.replicas",
)
"""A suspended job goes on with any number of workers: trainer.partsPerStep says how a step is cut, whichever worker computes it."""


_FIXED_BY_A_CHECKPOINT = ("trainer.batchSize", "trainer.seed", "trainer.lastBatch", "trainer.optimizer.name")
"""What the tensors of a checkpoint, or the samples of its next step, depend on. The trainer refuses the same, and more
(checkpoint/resuming.py), but only when the job fails of it."""
_HAS_NO_CHECKPOINT = "!has(oldSelf.status.training) || !has(oldSelf.status.training.lastCheckpoint)"


def _same_use_of_momentum() -> str:
    """CEL: momentum is above 0 exactly when it was. Of one that was a string the trainer decides (checkpoint/resuming.py)."""
    new, old = "self.spec.trainer.optimizer", "oldSelf.spec.trainer.optimizer"
    new_uses, old_uses = (f"(has({each}.momentum) && {each}.momentum > 0.0)" for each in (new, old))
    return f"(!has({new}) || !has({old}) || {new_uses} == {old_uses} || !({_readable(old)}))"


CHECKPOINT_RULES = tuple(
    Rule(
        # While the job runs all of the trainer is fixed, and only that rule answers.
        cel=f"{same} || !({_IS_SUSPENDED}) || {_HAS_NO_CHECKPOINT}",
        check=None,
        message="is immutable once the job has a checkpoint, which fits nothing else; create a new job",
        field=f"spec.{field}",
        shows=f"spec.{field}",
    )
    for field, same in (
        *((field, _same(field)) for field in _FIXED_BY_A_CHECKPOINT),
        ("trainer.optimizer.momentum", _same_use_of_momentum()),
    )
)


STRATEGY_RULES = tuple(
    Rule(
        cel=f"{same} || (({_IS_SUSPENDED}) && !({_HAS_NO_CHECKPOINT}))",
        check=None,
        message=f"{what}is immutable; create a new job, or suspend this one once it has a checkpoint: it goes on from that with {other}",
        field=f"spec.{field}",
        shows=f"spec.{field}" if what else "",
    )
    for field, same, what, other in (
        ("strategy", "self.spec.strategy == oldSelf.spec.strategy", "", "another strategy"),
        (
            "parameterServer.replicas",
            # Whether there are servers at all is the strategy's.
            "(!has(self.spec.parameterServer) || !has(oldSelf.spec.parameterServer) || "
            "self.spec.parameterServer.replicas == oldSelf.spec.parameterServer.replicas)",
            "the number of servers ",
            "any number of them",
        ),
    )
)
"""A checkpoint names its tensors, so that servers and workers of any strategy find theirs. Without one there is nothing to go on from."""


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

    RULES = (NAME_RULE, *STRATEGY_RULES, *EDIT_RULES, WORKERS_RULE, *CHECKPOINT_RULES)

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
