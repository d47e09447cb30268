"""The corpus of inputs: what must be refused, with what words, and what must be accepted. Both layers read it: API server and models."""

from __future__ import annotations

import re
from pathlib import Path

INPUTS = Path(__file__).parent / "inputs"


def files(kind: str) -> list[Path]:
    """The files of bad, good or transition, in order."""
    found = sorted((INPUTS / kind).glob("*.yaml"))
    assert found, f"no inputs of kind {kind}"
    return found


def wanted(file: Path) -> list[re.Pattern[str]]:
    """What the message has to match: the `# want:` lines at the top of the file."""
    lines = [line for line in file.read_text().splitlines() if line.startswith("# want: ")]
    assert lines, f"{file} does not say what it wants"
    return [re.compile(line.removeprefix("# want: ")) for line in lines]


def unmatched(file: Path, message: str) -> list[str]:
    """The wants that a message does not meet. Line ends do not count."""
    flat = " ".join(message.split())
    return [want.pattern for want in wanted(file) if not want.search(flat)]
