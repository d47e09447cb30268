"""The parts of a pod template that the API keeps as they are and a local run has to understand: envFrom and valueFrom.

On a cluster the API server judges them when the pod is made. Not here: what they refer to (documents.py).
"""

from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

FieldPath: TypeAlias = tuple[str | int, ...]
T = TypeVar("T")


class Unusable(Exception):
    """The job cannot run here as it is written. `path` is the field to blame."""

    def __init__(self, path: FieldPath, message: str) -> None:
        super().__init__(message)
        self.path = path
        self.message = message


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class ObjectReference(_Part):
    """A ConfigMap or Secret by name."""

    name: str
    optional: bool = False


class KeyReference(ObjectReference):
    """An entry of one."""

    key: str


class FieldReference(_Part):
    """A field of the pod."""

    field_path: Annotated[str, Field(alias="fieldPath")]


class EnvFrom(_Part):
    """An entry of envFrom."""

    prefix: str = ""
    config_map: Annotated[ObjectReference | None, Field(alias="configMapRef")] = None
    secret: Annotated[ObjectReference | None, Field(alias="secretRef")] = None


class ValueFrom(_Part):
    """The source of a variable."""

    config_map: Annotated[KeyReference | None, Field(alias="configMapKeyRef")] = None
    secret: Annotated[KeyReference | None, Field(alias="secretKeyRef")] = None
    field: Annotated[FieldReference | None, Field(alias="fieldRef")] = None


ENV_FROM: TypeAdapter[list[EnvFrom]] = TypeAdapter(list[EnvFrom])
VALUE_FROM = TypeAdapter(ValueFrom)


def understood(adapter: TypeAdapter[T], value: Any, path: FieldPath) -> T:
    """The value as the adapter has it. Raises Unusable with the place of the first thing that is wrong."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = "is required" if first["type"] == "missing" else f"{first['msg']} (got {first['input']!r})"
        raise Unusable((*path, *first["loc"]), what) from None
