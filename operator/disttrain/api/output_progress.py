"""spec.trainer.progress: the pattern by which the output of a script or command is read. Not here: the reading (the trainer's)."""

import re
from typing import Annotated, Final

import re2
from pydantic import StringConstraints

from disttrain.api.base import Model, Rule

GROUPS: Final = ("step", "loss", "samples", "total")
"""The named groups that a pattern may have."""
_NAMED: Final = "[(][?]P?<[^>]*>"
"""The beginning of a named group; in Python and CEL alike."""
_STEP: Final = "[(][?]P?<step>"
_KNOWN: Final = f"<({'|'.join(GROUPS)})>$"
_OPTIONS: Final = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = 1 << 20
"""Bytes that one pattern may take: more than any pattern for a line needs, and one that needs more is refused."""


def compiled(pattern: str) -> "re2._Regexp[str]":
    """The pattern as RE2 compiles it, which searches in time linear in the text. Raises ValueError that says what is wrong."""
    try:
        return re2.compile(pattern, options=_OPTIONS)
    except re2.error as error:
        (text,) = error.args
        raise ValueError(text.decode(errors="replace") if isinstance(text, bytes) else str(text)) from None


def _is_pattern(pattern: str) -> bool:
    try:
        compiled(pattern)
    except ValueError:
        return False
    return True


class OutputProgress(Model):
    """The progress that a script or command prints, line by line."""

    RULES = (
        Rule(
            # A pattern that RE2 does not take is an error of the evaluation, which the API server shows.
            cel="''.matches(self.pattern) in [true, false]",
            check=lambda p: _is_pattern(p.pattern),
            message="must be a regular expression in the syntax of RE2, which has no look-around and no back-references, such as "
            "step (?P<step>[0-9]+)",
            field="pattern",
            shows="pattern",
        ),
        Rule(
            cel=f"self.pattern.matches('{_STEP}')",
            check=lambda p: re.search(_STEP, p.pattern) is not None,
            message="must name the step, such as step (?P<step>[0-9]+)",
            field="pattern",
            shows="pattern",
        ),
        Rule(
            cel=f"self.pattern.findAll('{_NAMED}').all(g, g.matches('{_KNOWN}'))",
            check=lambda p: all(re.search(_KNOWN, group) for group in re.findall(_NAMED, p.pattern)),
            message=f"its named groups may be {', '.join(GROUPS[:-1])} and {GROUPS[-1]} alone",
            field="pattern",
            shows="pattern",
        ),
    )
    pattern: Annotated[str, StringConstraints(max_length=1024)]
    """Regular expression (RE2) that is searched in each line of the output, such as step (?P<step>[0-9]+).*loss (?P<loss>[0-9.e-]+).
    Groups: step (steps done, of the whole job), and optionally loss, samples (done so far, by all processes), total (steps of the job)."""
