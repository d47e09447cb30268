"""ConfigMaps, Secrets and PersistentVolumeClaims of a file, checked as the API server would: fields, keys, base64 where it has to be.

`problems` is for the reader of a file, who knows its lines; `content` gives what a checked object holds. Not here: who names the objects
(documents.py).
"""

import base64
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from disttrain.api.types import DnsSubdomain

MOST_BYTES: Final = 1 << 20
"""Of a ConfigMap or Secret."""


def _text(value: object) -> str:
    if value is None:
        return ""  # as the API server has it
    if not isinstance(value, str):
        raise PydanticCustomError("text", "must be a string; put it into quotes")
    return value


def _decoded(value: object) -> object:
    text = _text(value)
    try:
        return base64.b64decode("".join(text.split("\n")).replace("\r", ""), validate=True)
    except ValueError:  # it covers binascii.Error, and text that is not ASCII
        raise PydanticCustomError("base64", "must be base64") from None


def _plain_or_base64(value: object) -> object:
    try:
        return _decoded(value)
    except PydanticCustomError as error:
        if error.type == "base64":
            raise PydanticCustomError("base64", "must be base64; plain text belongs into stringData") from None
        raise


def _key(value: str) -> str:
    if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", value) or value == "." or value.startswith(".."):
        raise PydanticCustomError(
            "key", "is no key: letters, digits, '-', '_' and '.', and it must be able to name a file"
        )
    return value


Key = Annotated[str, AfterValidator(_key)]
Text = Annotated[str, BeforeValidator(_text)]
Base64 = Annotated[bytes, BeforeValidator(_decoded)]
SecretBase64 = Annotated[bytes, BeforeValidator(_plain_or_base64)]


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class _Metadata(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    name: DnsSubdomain


class ConfigMap(_Object):
    """A ConfigMap as a job can use it."""

    api_version: Annotated[Literal["v1"], Field(alias="apiVersion")] = "v1"
    kind: Literal["ConfigMap"]
    metadata: _Metadata
    data: dict[Key, Text] | None = None
    binary_data: Annotated[dict[Key, Base64] | None, Field(alias="binaryData")] = None
    immutable: StrictBool | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        for key in (self.data or {}).keys() & (self.binary_data or {}).keys():
            raise PydanticCustomError("twice", "the key {key} is in data and in binaryData", {"key": key})
        _check_size(self)
        return self

    def files(self) -> dict[str, bytes]:
        """What a volume of it shows."""
        return (self.binary_data or {}) | self.variables()

    def variables(self) -> dict[str, bytes]:
        """What the environment can be made of: binaryData is left out, as the kubelet does."""
        return {key: text.encode() for key, text in (self.data or {}).items()}


_KEYS_OF_TYPES: Mapping[str, tuple[str, ...]] = {
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
}
"""What a Secret of a type must have."""


class Secret(_Object):
    """A Secret as a job can use it."""

    api_version: Annotated[Literal["v1"], Field(alias="apiVersion")] = "v1"
    kind: Literal["Secret"]
    metadata: _Metadata
    data: dict[Key, SecretBase64] | None = None
    string_data: Annotated[dict[Key, Text] | None, Field(alias="stringData")] = None
    type: StrictStr = "Opaque"
    immutable: StrictBool | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        missing = [key for key in _KEYS_OF_TYPES.get(self.type, ()) if key not in self.files()]
        if self.type == "kubernetes.io/basic-auth" and not self.files().keys() & {"username", "password"}:
            missing = ["username"]
        if missing:
            parts = {"type": self.type, "missing": " and ".join(missing)}
            raise PydanticCustomError("keys", "a Secret of type {type} needs the key {missing}", parts)
        _check_size(self)
        return self

    def files(self) -> dict[str, bytes]:
        """What a volume of it shows."""
        return (self.data or {}) | {key: text.encode() for key, text in (self.string_data or {}).items()}

    def variables(self) -> dict[str, bytes]:
        """What the environment can be made of: all of it."""
        return self.files()


def _check_size(content: ConfigMap | Secret) -> None:
    size = sum(map(len, content.files().values()))
    if size > MOST_BYTES:
        parts = {"size": size, "most": MOST_BYTES}
        message = "holds {size} bytes, and the API server takes {most}; keep more than that on a claim"
        raise PydanticCustomError("size", message, parts)


def _positive(value: object) -> object:
    text = str(value)
    number = re.fullmatch(r"[+]?([0-9.]+)([KMGTPE]i|[numkMGTPE]|[eE][-+]?[0-9]+)?", text)
    if isinstance(value, bool) or not isinstance(value, int | float | str) or number is None:
        raise PydanticCustomError("storage", "must be a Kubernetes quantity such as 10Gi")
    if not number[1].strip("0."):
        raise PydanticCustomError("storage", "must be more than 0, such as 10Gi")
    return value


class _Requests(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    storage: Annotated[Any, AfterValidator(_positive)]


class _Resources(_Object):
    requests: _Requests
    limits: dict[str, Any] | None = None


AccessMode = Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]


class _ClaimSpec(_Object):
    access_modes: Annotated[list[AccessMode], Field(alias="accessModes", min_length=1)]
    resources: _Resources
    storage_class_name: Annotated[Literal[""] | DnsSubdomain | None, Field(alias="storageClassName")] = None
    volume_mode: Annotated[Literal["Filesystem", "Block"] | None, Field(alias="volumeMode")] = None
    volume_name: Annotated[StrictStr | None, Field(alias="volumeName")] = None
    volume_attributes_class_name: Annotated[StrictStr | None, Field(alias="volumeAttributesClassName")] = None
    selector: dict[str, Any] | None = None
    data_source: Annotated[dict[str, Any] | None, Field(alias="dataSource")] = None
    data_source_ref: Annotated[dict[str, Any] | None, Field(alias="dataSourceRef")] = None

    @model_validator(mode="after")
    def _alone(self) -> Self:
        if "ReadWriteOncePod" in self.access_modes and len(self.access_modes) > 1:
            raise PydanticCustomError("alone", "accessModes: ReadWriteOncePod excludes the others")
        return self


class PersistentVolumeClaim(_Object):
    """A claim; a local run makes a folder of it."""

    api_version: Annotated[Literal["v1"], Field(alias="apiVersion")] = "v1"
    kind: Literal["PersistentVolumeClaim"]
    metadata: _Metadata
    spec: _ClaimSpec
    status: Any = None


_CONTENT: Mapping[str, type[ConfigMap] | type[Secret]] = {"ConfigMap": ConfigMap, "Secret": Secret}
_MODELS: Mapping[str, type[_Object]] = {**_CONTENT, "PersistentVolumeClaim": PersistentVolumeClaim}

_SENTENCES = {
    "missing": "is required",
    "bool_type": "must be true or false",
    "string_type": "must be a string; put it into quotes",
    "list_type": "must be a list",
    "too_short": "needs at least one entry",
    "dict_type": "must be an object: a value for each key",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}


def problems(document: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What is wrong with a document, as paths and sentences; nothing for another kind."""
    model = _MODELS.get(str(document.get("kind")))
    if model is None:
        return
    try:
        model.model_validate(document, by_alias=True, by_name=False)
    except ValidationError as error:
        for details in error.errors(include_url=False, include_input=False):
            path, sentence = details["loc"], _SENTENCES.get(details["type"], details["msg"])
            if path == ("apiVersion",):
                sentence = "must be v1"
            elif path[-1:] == ("[key]",):
                path = path[:-1]
            elif path == ("metadata", "name") and details["type"] != "missing":
                sentence = "must be a lower-case DNS name"
            elif details["type"] == "extra_forbidden":
                close = difflib.get_close_matches(str(path[-1]), _fields(model, path[:-1]), 1, 0.6)
                sentence = f'unknown field; did you mean "{close[0]}"?' if close else "unknown field"
            yield path, sentence


def _fields(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """The names of an object's fields, as users write them."""
    for part in path:
        found = next(info for name, info in model.model_fields.items() if part in (name, info.alias))
        assert isinstance(found.annotation, type)
        model = found.annotation
    return [info.alias or name for name, info in model.model_fields.items()]


def title(document: Mapping[str, Any]) -> str:
    """What a document is called where its line is not known."""
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{document.get('kind')} {name or 'without a name'}"


def parse(document: Mapping[str, Any]) -> ConfigMap | Secret | None:
    """The object of a document, None for another kind. Raises ValidationError."""
    model = _CONTENT.get(str(document.get("kind")))
    return model.model_validate(document, by_alias=True, by_name=False) if model is not None else None
