"""YAML as kubectl reads it, with the line of every value.

PyYAML alone differs from kubectl in what a scalar is (`1e-4` is a number there, `2024-01-01` and `1:30` are strings), lets a key
be given twice, and unfolds a bomb of aliases. Not here: what the values mean (files.py).
"""

import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import yaml

Path: TypeAlias = tuple[str | int, ...]

MAX_BYTES: Final = 1_500_000
"""What the API server takes at most."""
_MAX_NODES: Final = 100_000
_MAX_DEPTH: Final = 100
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
"""Half of a character as JSON escapes those beyond U+FFFF."""


class YamlError(Exception):
    """The text is not YAML that kubectl would take. `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(frozen=True)
class Value:
    """A document: the plain value, and the line of every path in it."""

    value: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """The line of a path, or of the nearest object around it that the file has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _Loader(yaml.SafeLoader):
    """SafeLoader with kubectl's idea of a scalar."""


_KEPT = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_implicit_resolvers = _KEPT
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0b[01_]+|0[0-7_]*|0x[0-9a-fA-F_]+|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def load(text: str) -> list[Value]:
    """The documents of a file, empty ones left out. Raises YamlError."""
    if len(text.encode()) > MAX_BYTES:
        raise YamlError(1, f"the file is larger than {MAX_BYTES} bytes, which the API server would refuse")
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(text)
            text = text.replace("\t", " ")  # in JSON a tab is a blank; in YAML it may not indent
    try:
        loader = _Loader(text)
        documents = []
        while loader.check_node() and (node := loader.get_node()) is not None:
            lines: dict[Path, int] = {}
            value = _Reader(loader, lines).read(node, (), node.start_mark.line + 1)
            if value is not None:
                documents.append(Value(value, lines))
        return documents
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(mark.line + 1 if mark else 1, f"not YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"not YAML: character #x{error.character:04x} is not allowed") from None
    except RecursionError:
        raise YamlError(1, "not YAML that can be used: nested too deeply") from None


class _Reader:
    """Turns nodes into values and writes the lines down."""

    def __init__(self, loader: _Loader, lines: dict[Path, int]) -> None:
        self._loader = loader
        self._lines = lines
        self._nodes = 0

    def read(self, node: yaml.Node, path: Path, line: int) -> Any:
        # Counted as unfolded: an alias costs what it stands for.
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise YamlError(line, f"more than {_MAX_NODES} values; aliases are counted as often as they are used")
        if len(path) > _MAX_DEPTH:
            raise YamlError(line, f"nested more than {_MAX_DEPTH} levels deep")
        self._lines[path] = line
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, n), item.start_mark.line + 1) for n, item in enumerate(node.value)]
        return self._scalar(node, line)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            self._loader.flatten_mapping(node)
            merged = True
        else:
            merged = False
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(line, "a key must be a plain word")
            key = key_node.value
            if key in result and not merged:
                raise YamlError(line, f"key {key!r} is given twice, first in line {self._lines[(*path, key)]}")
            result[key] = self.read(value_node, (*path, key), line)
        return result

    def _scalar(self, node: yaml.Node, line: int) -> Any:
        value = self._loader.construct_object(node)
        if isinstance(value, float):
            if value != value or abs(value) == float("inf"):
                raise YamlError(line, f"{node.value} is no JSON number")
            return int(value) if value.is_integer() and abs(value) < 2**53 else value  # as kubectl sends it
        if isinstance(value, str) and _SURROGATE.search(value):
            try:
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                raise YamlError(line, "half of a surrogate pair is no character") from None
        if value is not None and not isinstance(value, str | int | bool):
            raise YamlError(line, f"the YAML tag {node.tag} has no place in a Kubernetes object")
        return value
