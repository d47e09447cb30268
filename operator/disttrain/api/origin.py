"""spec.checkpoint.from: the other job that a training starts from. A name, or an object.

A structural schema has no union of a string and an object, and CEL sees no field without a type. So the schema of the field has none, and
keywords that judge one kind of value each say what is right of it: `pattern` of a string, `properties` and `required` of an object
(docs/design/0001). Not here: how the checkpoint is found (the trainer's checkpoint/origin.py).
"""

import re
from enum import StrEnum
from itertools import combinations
from typing import Annotated, Any, Final, Self

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    StrictInt,
    StringConstraints,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from disttrain.api.base import Model
from disttrain.api.names import MAX_JOB_NAME
from disttrain.api.types import INT32_MAX, JobName

_NAME: Final = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"


class Include(StrEnum):
    """What is taken from the other job's checkpoint."""

    MODEL = "Model"
    """Parameters and buffers; the training starts at step 0."""
    ALL = "All"
    """Also the optimiser's state, the step and the order of the data: the training goes on as that job would have."""


class Origin(Model):
    """Another job, from whose checkpoint this one starts."""

    job: JobName
    """Name of the job, in the same namespace, with its checkpoints on the same claim. It may be deleted."""
    step: Annotated[StrictInt, Field(ge=0, le=INT32_MAX)] | None = None
    """Step of the checkpoint. Default: the newest one that is good."""
    include: Include = Include.MODEL
    """Model: parameters and buffers; All: also the optimiser's state, the step and the order of the data. Default: Model."""
    uid: (
        Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}((-[0-9a-f]{4}){3}-[0-9a-f]{12})?$", max_length=36)]
        | None
    ) = None
    """Of several jobs of the name the one with this uid, whole or its first 8 characters, as in the name of its folder on the claim.
    Default: the newest."""

    _by_name: bool = PrivateAttr(default=False)
    """Written as a name alone."""

    @model_validator(mode="wrap")
    @classmethod
    def _of_a_name(cls, data: Any, validated: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, dict | Origin):
            return validated(data)
        if not isinstance(data, str) or len(data) > MAX_JOB_NAME or not re.fullmatch(_NAME, data):
            raise PydanticCustomError(
                "origin", "must be the name of a job, or an object such as {job: digits, step: 100}"
            )
        origin = validated({"job": data})
        origin._by_name = True
        return origin

    @model_serializer(mode="wrap")
    def _as_written(self, serialized: SerializerFunctionWrapHandler) -> Any:
        return self.job if self._by_name else serialized(self)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        fields = [name for name in schema["properties"] if name != "job"]
        exact = [
            {"maxProperties": 1 + len(some)} | ({"required": list(some)} if some else {})
            for count in range(len(fields) + 1)
            for some in combinations(fields, count)
        ]
        untyped = {key: value for key, value in schema.items() if key not in ("type", "additionalProperties")}
        return untyped | {
            "x-kubernetes-preserve-unknown-fields": True,
            "pattern": _NAME,
            "maxLength": MAX_JOB_NAME,
            # Neither numbers nor lists nor booleans; and of an object no field that is not known: none is pruned here.
            "minimum": 1,
            "maximum": 0,
            "minItems": 1,
            "maxItems": 0,
            "not": {"anyOf": [{"enum": [True, False]}, {"not": {"anyOf": exact}}]},
        }
