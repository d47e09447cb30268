"""An object of another operator that is being converted: what was read of it, and so what was not. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

Path: TypeAlias = tuple[str | int, ...]

NO_COUNTERPART: Final = "has no counterpart in a DistTrainJob"


@dataclass(frozen=True, slots=True)
class Note:
    """What a reader of the result must know of a field."""

    path: Path
    text: str


@dataclass(slots=True)
class Source:
    """The object. A field that nobody takes is said to have no counterpart."""

    body: Mapping[str, Any]
    notes: list[Note] = field(default_factory=list)
    _taken: set[Path] = field(default_factory=set)

    def take(self, *path: str | int, default: Any = None) -> Any:
        """The value at a path, with all that is in it; the default where there is none, or null."""
        value = self.look(*path)
        if value is not None:
            self._taken.add(path)
        return default if value is None else value

    def look(self, *path: str | int) -> Any:
        """The same, without taking it."""
        value: Any = self.body
        for name in path:
            if isinstance(name, int):
                value = value[name] if isinstance(value, list) and name < len(value) else None
            else:
                value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def note(self, path: Path, text: str) -> None:
        """Says something of a field, which is taken by it."""
        self._taken.add(path)
        self.notes.append(Note(path, text))

    def drop(self, path: Path, text: str) -> None:
        """The same, where there is such a field."""
        if self.look(*path) not in (None, {}, []):
            self.note(path, text)

    def all_notes(self) -> list[Note]:
        """What was said, and the fields that nobody took."""
        return [*self.notes, *(Note(path, NO_COUNTERPART) for path in self._rest(self.body.get("spec"), ("spec",)))]

    def _rest(self, value: Any, path: Path) -> Iterator[Path]:
        if path in self._taken or value is None:
            return
        if not any(taken[: len(path)] == path for taken in self._taken):
            yield path
        elif isinstance(value, Mapping):
            for name, child in value.items():
                yield from self._rest(child, (*path, name))
        elif isinstance(value, list):
            for number, child in enumerate(value):
                yield from self._rest(child, (*path, number))


def whole(value: object, default: int, *, least: int = 0) -> int:
    """A whole number as the other operators have it, also as text."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= least else default
