"""The scalar types of the API: numbers, quantities, names, bounded maps."""

import decimal
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.alias_generators import to_snake
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from disttrain.api.names import MAX_JOB_NAME

INT32_MAX = 2_147_483_647

_DECIMAL: Final = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?")
"""A decimal in a string, as release 0.1.0 stored it."""
QUOTED_NUMBER: Final = "quoted_number"
"""The type of the problem with such a string, by which reading.py knows it."""


class StoredDecimal(float):
    """A decimal that release 0.1.0 stored as a string. DISTTRAIN_JOB has it as it is stored: trainers of that release which began an
    attempt compare a digest of its text with that of a pod that is made again."""

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def _number(value: object, validated: ValidatorFunctionWrapHandler) -> object:
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        raise PydanticCustomError(QUOTED_NUMBER, "write {number} without quotes", {"number": value})
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("number", "must be a number, such as 0.003")
    number = validated(value)
    return value if isinstance(value, StoredDecimal) else number  # pydantic makes a plain float of it


_AS_STORED: Final = PlainSerializer(lambda value: value.text if isinstance(value, StoredDecimal) else value)
FiniteNumber = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_number)]
"""A JSON number. A string is refused, and so are infinity and NaN, which JSON does not have."""
Number = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False), WrapValidator(_number), _AS_STORED]
"""A number of 0 or more, such as 0.003 or 1e-4. The bound is within int64, in which the API server compares whole numbers."""
Bound = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False), WrapValidator(_number)]
"""A number of either sign."""
NumberBelow1 = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), WrapValidator(_number), _AS_STORED]
PositiveNumber = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False), WrapValidator(_number)]
"""A number above 0."""
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), WrapValidator(_number), _AS_STORED]
"""A share: above 0, at most 1."""
Factor = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), WrapValidator(_number), _AS_STORED]
"""From 0 to 1."""

Factory = Annotated[
    str,
    StringConstraints(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
        max_length=253,
    ),
]
"""`package.module:callable`."""

DnsLabel = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
JobName = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=MAX_JOB_NAME)]
"""The name of a DistTrainJob."""
PartName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
"""The name of a container or volume, an RFC 1123 label."""
DnsSubdomain = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", max_length=253)
]
AbsolutePath = Annotated[
    str, StringConstraints(pattern=r"^/([^/.][^/]*|\.[^/.][^/]*)(/([^/.][^/]*|\.[^/.][^/]*))*$", max_length=253)
]
"""An absolute path without `..` and without an empty part."""

Image = Annotated[str, StringConstraints(pattern=r"^[!-~]+$", max_length=1024)]
"""An image reference: printable ASCII without blanks, in which Go's and Rust's idea of a blank cannot differ."""

Argument = Annotated[str, StringConstraints(max_length=4096)]

QUANTITY = r"^[+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"
"""A Kubernetes quantity that is not negative, such as 500m, 4Gi or 2."""
_MOST = 2**53 - 1
"""The largest whole number that every reader of JSON takes for what it is; a larger quantity is a string, with a suffix."""
QUANTITY_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    "x-kubernetes-int-or-string": True,
    "pattern": QUANTITY,
    "minimum": 0,
    "maximum": _MOST,
    "maxLength": 64,
}


def _quantity(value: object) -> object:
    # One sentence for whatever is wrong; the union alone would give one for each of its members.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | str)
        or not re.fullmatch(QUANTITY, str(value))
        or len(str(value)) > 64
        or (isinstance(value, int) and value > _MOST)
    ):
        raise PydanticCustomError("quantity", "must be a Kubernetes quantity of 0 or more, such as 500m, 4Gi or 2")
    return value


Quantity = Annotated[
    int | str,
    BeforeValidator(_quantity),
    Field(json_schema_extra=lambda schema: (schema.clear(), schema.update(QUANTITY_SCHEMA))[0]),
]

FreeForm = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}),
]
"""An object that is handed on as it is; the CRD keeps its unknown fields."""

StringMap = Annotated[
    dict[str, Annotated[str, StringConstraints(max_length=4096)]],
    Field(max_length=64),
]

LabelValue = Annotated[str, StringConstraints(pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$", max_length=63)]
LabelMap = Annotated[dict[str, LabelValue], Field(max_length=64)]
"""Labels: values of at most 63 letters, digits, '-', '_' and '.'."""


_SUFFIXES = {
    suffix: decimal.Decimal(1000) ** power
    for power, suffix in enumerate(("n", "u", "m", "", "k", "M", "G", "T", "P", "E"), -3)
}
_SUFFIXES |= {
    suffix: decimal.Decimal(1024) ** power for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)
}


def quantity_value(quantity: int | str) -> decimal.Decimal:
    """What a Kubernetes quantity amounts to: 500m is 0.5, 1Ki is 1024, 1e3 is 1000."""
    text = str(quantity)
    number = text.rstrip("KMGTPEinumk")
    return decimal.Decimal(number) * _SUFFIXES[text[len(number) :]]


def list_map(key: str, *, max_items: int) -> tuple[FieldInfo, AfterValidator]:
    """A list of objects that `key` tells apart, here and in server-side apply (x-kubernetes-list-type: map)."""

    def unique(items: Sequence[Any]) -> Sequence[Any]:
        seen: set[object] = set()
        for position, item in enumerate(items):
            value = getattr(item, to_snake(key))
            if value in seen:
                raise PydanticCustomError(
                    "duplicate",
                    "Duplicate value: entry {position} repeats {key} {value}",
                    {"position": position, "key": key, "value": value},
                )
            seen.add(value)
        return items

    extra: dict[str, Any] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return Field(max_length=max_items, json_schema_extra=extra), AfterValidator(unique)


def list_keys(model: type[BaseModel]) -> dict[str, str]:
    """The lists of a model that are a `list_map`, by their names in camelCase, and the key of each."""
    keys = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and isinstance(map_keys := extra.get("x-kubernetes-list-map-keys"), list):
            keys[field.alias or name] = str(map_keys[0])
    return keys
