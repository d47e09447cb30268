"""What a check found, and the command that mends it. Pure."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How a finding counts."""

    OK = "ok"
    NOTE = "note"
    """Something that is not there, and that not every job needs."""
    WARNING = "warning"
    """Jobs run, but not every one, or not well."""
    MISSING = "missing"
    """No job runs without it."""
    UNKNOWN = "unknown"
    """Could not be seen, as without the right to."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check."""

    check: str
    """What was looked at, in a word or two."""
    level: Level
    text: str
    mend: str = ""
    """A command, or what to do; "" where nothing is to be done."""

    def to_dict(self) -> dict[str, str]:
        fields = {"check": self.check, "level": self.level.value, "text": self.text, "mend": self.mend}
        return {name: value for name, value in fields.items() if value}
