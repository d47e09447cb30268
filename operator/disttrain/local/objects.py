"""ConfigMaps and Secrets of a file, checked as the API server would: their fields, their keys, and base64 where it has to be.

`problems` is for whoever reads the file and knows its lines; `content` gives what a checked object holds. Not here: who names the objects
(documents.py).
"""

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from disttrain.api.types import DnsSubdomain


def _text(value: object) -> object:
    if value is None:
        return ""  # as the API server has it
    if not isinstance(value, str):
        raise PydanticCustomError("text", "must be a string; put it into quotes")
    return value


def _decoded(value: object) -> object:
    text = _text(value)
    assert isinstance(text, str)
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
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class _Metadata(_Object):
    name: DnsSubdomain


class ConfigMap(_Object):
    """The fields of a ConfigMap that a job can use."""

    api_version: Annotated[Literal["v1"], Field(alias="apiVersion")] = "v1"
    metadata: _Metadata
    data: dict[Key, Text] | None = None
    binary_data: Annotated[dict[Key, Base64] | None, Field(alias="binaryData")] = None

    def files(self) -> dict[str, bytes]:
        """What a volume of it shows."""
        return (self.binary_data or {}) | self.variables()

    def variables(self) -> dict[str, bytes]:
        """What the environment can be made of: binaryData is left out, as the kubelet does."""
        return {key: text.encode() for key, text in (self.data or {}).items()}


class Secret(_Object):
    """The fields of a Secret that a job can use."""

    api_version: Annotated[Literal["v1"], Field(alias="apiVersion")] = "v1"
    metadata: _Metadata
    data: dict[Key, SecretBase64] | None = None
    string_data: Annotated[dict[Key, Text] | None, Field(alias="stringData")] = None

    def files(self) -> dict[str, bytes]:
        """What a volume of it shows."""
        return (self.data or {}) | {key: text.encode() for key, text in (self.string_data or {}).items()}

    def variables(self) -> dict[str, bytes]:
        """What the environment can be made of: all of it."""
        return self.files()


_MODELS: Mapping[str, type[ConfigMap] | type[Secret]] = {"ConfigMap": ConfigMap, "Secret": Secret}

_SENTENCES = {
    "missing": "is required",
    "literal_error": "must be v1",
    "dict_type": "must be an object: a value for each key",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}


def problems(document: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What is wrong with a document, as paths and sentences; nothing for another kind."""
    try:
        parse(document)
    except ValidationError as error:
        for details in error.errors(include_url=False, include_input=False):
            path, sentence = details["loc"], _SENTENCES.get(details["type"], details["msg"])
            if path[-1:] == ("[key]",):
                path = path[:-1]
            elif path == ("metadata", "name") and details["type"] != "missing":
                sentence = "must be a lower-case DNS name"
            yield path, sentence


def title(document: Mapping[str, Any]) -> str:
    """What a document is called where its line is not known."""
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{document.get('kind')} {name or 'without a name'}"


def parse(document: Mapping[str, Any]) -> ConfigMap | Secret | None:
    """The object of a document, None for another kind. Raises ValidationError."""
    model = _MODELS.get(str(document.get("kind")))
    return model.model_validate(document) if model is not None else None
