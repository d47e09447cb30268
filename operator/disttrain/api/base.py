"""The base of every API model: camelCase outside, frozen, no unknown field, and rules that hold in two languages.

A `Rule` is stated once as CEL, for the API server, and once as Python, for `disttrain run` and `disttrain lint`; the corpus in
tests/apiserver/inputs holds the two against each other. Not here: the fields (spec.py, status.py), the CRD (crd.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, PydanticCustomError

IMMUTABLE: Final = "is immutable; create a new job"
"""What a transition rule says of a field that never changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What must hold within one object.

    cel: the expression for the API server (x-kubernetes-validations, KEP-2876).
    check: the same in Python; None for a transition rule, which needs the old object.
    message: what is expected and what to do, one line; the same in both.
    field: the camelCase field to blame, dotted if it is deeper, "" for the object itself.
    shows: the camelCase field whose value stands at the end of the message, dotted if it is deeper, "" for none. Where it can be
        absent, the message stands alone then.
    """

    cel: str
    check: Callable[[Any], bool] | None
    message: str
    field: str = ""
    shows: str = ""

    def as_validation(self) -> dict[str, str]:
        """The entry of x-kubernetes-validations."""
        validation = {"rule": self.cel, "message": self.message}
        if self.field:
            validation["fieldPath"] = f".{self.field}"
        if self.shows:
            # format and not +: the API server takes the size of string(number) for unbounded, and the expression for too costly.
            literal = self.message.replace("\\", "\\\\").replace("'", "\\'").replace("%", "%%")
            validation["messageExpression"] = f"'{literal} ({self._label} %s)'.format([self.{self.shows}])"
        return validation

    def message_for(self, broken: BaseModel) -> str:
        """The message about an object that breaks the rule; as the API server makes it of messageExpression."""
        if not self.shows or (value := _value(broken, self.shows)) is None:
            return self.message
        return f"{self.message} ({self._label} {str(value).lower() if isinstance(value, bool) else value})"

    @property
    def _label(self) -> str:
        return "got" if self.shows == self.field else f"{self.shows}:"


def _value(model: BaseModel, field: str) -> object:
    """The value of a dotted camelCase field, None where there is none."""
    value: Any = model
    for part in field.split("."):
        if value is None:
            return None
        names = {info.alias or name: name for name, info in type(value).model_fields.items()}
        value = getattr(value, names[part])
    return value


class Model(BaseModel):
    """An object of the API. Subclasses list what must hold between their fields in `RULES`."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """As the API server has it: the null of a field that it knows is dropped, and the default arrives."""
        if not isinstance(data, dict) or None not in data.values():
            return data
        known = {info.alias for info in cls.model_fields.values()}
        return {key: value for key, value in data.items() if value is not None or key not in known}

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        if not self.RULES:
            return self
        broken = [rule for rule in self.RULES if rule.check is not None and not rule.check(self)]
        if broken:
            messages = [(rule.field, rule.message_for(self)) for rule in broken]
            text = "; ".join(f"{field}: {message}" if field else message for field, message in messages)
            raise PydanticCustomError("rule", "{text}", {"text": text, "broken": messages})
        return self

    def __copy__(self) -> Self:
        """Without what was computed from the fields (`cached_property`): `model_copy` changes them."""
        copied = super().__copy__()
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        if cls.RULES:
            schema["x-kubernetes-validations"] = [rule.as_validation() for rule in cls.RULES]
        return schema

    def to_dict(self) -> dict[str, Any]:
        """The object as the API server stores it: camelCase, JSON types, nothing that is None."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class OpenModel(Model):
    """A Kubernetes object of which we type a part; unknown fields are kept."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="allow",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
