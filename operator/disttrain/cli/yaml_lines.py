"""YAML and JSON as kubectl reads them, with the line of every value, and every fault of the text at once.

kubectl cuts a text into documents at the lines that begin with `---`, and reads each by itself: so a document with a fault hides none of
the others. Stricter than kubectl in two things: a key that is given twice, of which it would silently take the last, and a YAML tag.
Not here: what a plain scalar is (yaml_scalars.py), what the values mean (files.py).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import yaml

from disttrain.cli.yaml_scalars import Scalar, key, scalar

Path: TypeAlias = tuple[str | int, ...]

MAX_BYTES: Final = 1_500_000
"""What the API server takes at most for one object."""
_MAX_NODES: Final = 100_000
_MAX_DEPTH: Final = 100
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
"""Half of a character as JSON escapes those beyond U+FFFF."""
_SEPARATOR: Final = re.compile(r"^---([^\n]*)(?:\n|\Z)", re.MULTILINE)
_END: Final = re.compile(r"^\.\.\.(?=\s|\Z)", re.MULTILINE)
_BLANKS: Final = re.compile(r"\s*")
_PLAIN: Final = "plain"
"""The tag of a scalar without quotes."""
_YAML_ORG: Final = "tag:yaml.org,2002:"
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "null": (type(None),),
}


@dataclass(frozen=True, order=True)
class Fault:
    """What is wrong with the text, or (`warning`) doubtful. `line` counts from 1."""

    line: int
    message: str
    warning: bool = False


@dataclass(frozen=True)
class Value:
    """An object of a document: the plain value, and the line of every path in it."""

    value: Any
    lines: dict[Path, int]
    base: Path = ()
    """Where it is in its document: the items of a List are objects of their own."""

    def line(self, path: Path) -> int:
        """The line of a path, or of the nearest object around it that the file has."""
        full = (*self.base, *path)
        while full and full not in self.lines:
            full = full[:-1]
        return self.lines.get(full, 1)

    def at(self, path: Path, value: Any) -> "Value":
        """The object at a path within this one, where `value` is."""
        return Value(value, self.lines, (*self.base, *path))


@dataclass(frozen=True)
class Contents:
    """What a text holds: its documents, empty ones left out, and its faults."""

    documents: tuple[Value, ...]
    faults: tuple[Fault, ...]


def load(text: str) -> Contents:
    """The documents of a text."""
    documents: list[Value] = []
    faults: list[Fault] = []
    for part, line in _parts(text, faults):
        if len(part.encode(errors="surrogatepass")) > MAX_BYTES:
            faults.append(
                Fault(line, f"the document is larger than {MAX_BYTES} bytes, which the API server would refuse")
            )
            continue
        try:
            found = _read(part, line, faults)
        except _Fatal as fatal:
            faults.append(fatal.fault)
        else:
            documents += [found] if found is not None else []
    return Contents(tuple(documents), tuple(sorted(faults)))


class _Fatal(Exception):
    """The document cannot be read further."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.fault = Fault(line, message)


def _parts(text: str, faults: list[Fault]) -> Iterator[tuple[str, int]]:
    """The texts of the documents and their first lines. JSON objects may follow one another without a separator."""
    begin, line = 0, 1
    for separator in [*_SEPARATOR.finditer(text), None]:
        part = text[begin : separator.start() if separator else len(text)]
        for piece in _json_objects(part.removeprefix("\ufeff")):
            if piece.strip():
                yield piece, line
            line += piece.count("\n")
        if separator:
            rest = separator[1].strip()
            if rest and not rest.startswith("#"):
                message = f"{separator[0].strip()!r} separates no documents for kubectl: --- must stand alone"
                faults.append(Fault(line, message))
            begin = separator.end()
            line += 1


def _json_objects(part: str) -> Iterator[str]:
    """The JSON objects at the beginning, one by one, and then the rest; together they are the part."""
    decoder, position = json.JSONDecoder(), 0
    while (begin := _BLANKS.match(part, position).end()) < len(part) and part[begin] == "{":  # type: ignore[union-attr]
        try:
            _, end = decoder.raw_decode(part, begin)
        except (ValueError, RecursionError):
            break
        yield part[position:end]
        position = end
    yield part[position:]


def _read(text: str, first_line: int, faults: list[Fault]) -> Value | None:
    """The document of a text; nothing for an empty one. Raises _Fatal."""
    if (end := _END.search(text)) is not None:
        text, rest = text[: end.start()], text[end.end() :]
        if ignored := re.search(r"^[^\S\n]*[^#\s]", rest, re.MULTILINE):
            line = first_line + text.count("\n") + rest.count("\n", 0, ignored.end())
            message = "kubectl ignores what stands here, after the end of the document: put a line --- before it"
            faults.append(Fault(line, message, warning=True))
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        lines: dict[Path, int] = {}
        value = _Reader(lines, faults, first_line).read(node, (), node.start_mark.line + first_line)
        return Value(value, lines) if value is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        problem = str(error.problem or error.context)
        if "'\\t'" in problem:
            problem += ": a tab may not indent, use blanks"
        elif directive := re.search("^%", text, re.MULTILINE):
            line, problem = text.count("\n", 0, directive.start()), "kubectl takes no line that begins with %"
        raise _Fatal(line + first_line, f"not YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + first_line
        raise _Fatal(line, f"not YAML: character #x{error.character:04x} is not allowed") from None
    except RecursionError:
        raise _Fatal(first_line, "not YAML that can be used: nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves plain scalars to us, and takes a tab where libyaml and kubectl take it."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def scan_to_next_token(self) -> None:
        # As in yaml/scanner.py, and a tab counts as a blank where it cannot be taken for indentation.
        if self.index == 0 and self.peek() == "\ufeff":
            self.forward()
        while True:
            while self.peek() == " " or (self.peek() == "\t" and (self.flow_level or not self.allow_simple_key)):
                self.forward()
            if self.peek() == "#":
                while self.peek() not in "\0\r\n\x85\u2028\u2029":
                    self.forward()
            if not self.scan_line_break():  # type: ignore[no-untyped-call]
                return
            if not self.flow_level:
                self.allow_simple_key = True


class _Reader:
    """Turns nodes into values and writes the lines down."""

    def __init__(self, lines: dict[Path, int], faults: list[Fault], first_line: int) -> None:
        self._lines = lines
        self._faults = faults
        self._first = first_line
        self._nodes = 0

    def read(self, node: yaml.Node, path: Path, line: int) -> Any:
        # Counted as unfolded: an alias costs what it stands for.
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise _Fatal(line, f"more than {_MAX_NODES} values; aliases are counted as often as they are used")
        if len(path) > _MAX_DEPTH:
            raise _Fatal(line, f"nested more than {_MAX_DEPTH} levels deep")
        self._lines[path] = line
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, line)
        if node.tag not in (_YAML_ORG + "map", _YAML_ORG + "seq"):
            self._fault(line, f"the YAML tag {_tag(node)} has no place in a Kubernetes object")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, {}, {})
        return [self.read(item, (*path, n), self._line(item)) for n, item in enumerate(node.value)]

    def _mapping(
        self, node: yaml.MappingNode, path: Path, result: dict[str, Any], given: dict[str, int]
    ) -> dict[str, Any]:
        """Fills `result`. Where a merge key stands, its keys are set, and what comes later wins, as kubectl has it."""
        for key_node, value_node in node.value:
            line = self._line(key_node)
            if isinstance(key_node, yaml.ScalarNode) and (key_node.tag, key_node.value) == (_PLAIN, "<<"):
                self._merge(value_node, path, result, line)
                continue
            name = self._key(key_node, line)
            if name is None:
                continue
            if name in given:
                self._fault(line, f"key {name!r} is given twice, first in line {given[name]}")
            given.setdefault(name, line)
            result[name] = self.read(value_node, (*path, name), line)
        return result

    def _merge(self, node: yaml.Node, path: Path, result: dict[str, Any], line: int) -> None:
        sources = list(reversed(node.value)) if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:  # of several the first one wins
            if not isinstance(source, yaml.MappingNode):
                self._fault(line, "the merge key << takes an object, or a list of objects")
                return
            self._nodes += 1
            if self._nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
                raise _Fatal(line, f"more than {_MAX_NODES} values; aliases are counted as often as they are used")
            self._mapping(source, path, result, {})

    def _key(self, node: yaml.Node, line: int) -> str | None:
        name = key(self._scalar(node, line)) if isinstance(node, yaml.ScalarNode) else None
        if name is None:
            self._fault(line, "a key must be a plain word")
        elif name != node.value and node.tag == _PLAIN:
            message = f"kubectl reads the key {node.value} as {name}; put it into quotes if that is not meant"
            self._faults.append(Fault(line, message, warning=True))
        return name

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Scalar:
        if node.tag in (_YAML_ORG + "str", "!"):
            return self._text(node.value, line)
        value = scalar(node.value)
        wanted = _TYPES.get(node.tag.removeprefix(_YAML_ORG))
        if node.tag != _PLAIN and (wanted is None or not isinstance(value, wanted)):
            self._fault(line, f"the YAML tag {_tag(node)} has no place in a Kubernetes object")
            return str(node.value)
        if isinstance(value, float) and (value != value or abs(value) == float("inf")):
            self._fault(line, f"{node.value} is no JSON number")
            return str(node.value)
        return self._text(value, line) if isinstance(value, str) else value

    def _text(self, text: str, line: int) -> str:
        if _SURROGATE.search(text):
            try:
                return text.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                self._fault(line, "half of a surrogate pair is no character")
        return text

    def _line(self, node: yaml.Node) -> int:
        return int(node.start_mark.line) + self._first

    def _fault(self, line: int, message: str) -> None:
        self._faults.append(Fault(line, message))


def _tag(node: yaml.Node) -> str:
    tag = str(node.tag)
    return "!!" + tag.removeprefix(_YAML_ORG) if tag.startswith(_YAML_ORG) else tag
