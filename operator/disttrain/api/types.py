"""The scalar types of the API: decimals, quantities, names, bounded maps. What a Kubernetes API has instead of floats."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints

INT32_MAX = 2_147_483_647

Decimal = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$", max_length=32),
]
"""A non-negative decimal as a string, such as "0.1" or "1e-4": the API conventions know no floats."""

Factory = Annotated[
    str,
    StringConstraints(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
        max_length=253,
    ),
]
"""`package.module:callable`."""

DnsLabel = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
DnsSubdomain = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", max_length=253)
]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/([^/.][^/]*|\.[^/.][^/]*)(/([^/.][^/]*|\.[^/.][^/]*))*$", max_length=253)]
"""An absolute path without `..` and without an empty part."""

FileName = Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z0-9]+$", min_length=1, max_length=253)]
Argument = Annotated[str, StringConstraints(max_length=4096)]

QUANTITY = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"
"""A Kubernetes quantity, such as 500m, 4Gi or 2."""
QUANTITY_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    "x-kubernetes-int-or-string": True,
    "pattern": QUANTITY,
    "maxLength": 64,
}
Quantity = Annotated[
    int | Annotated[str, StringConstraints(pattern=QUANTITY, max_length=64)],
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
