"""Text from a cluster as one printable line. It may hold anything: control characters would reach the terminal."""

import re
from typing import Final

_NOT_PRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_WIDEST: Final = 400
"""Characters of a line."""


def one_line(text: object) -> str:
    """The text with spaces for control characters and line ends, cut where it is too long."""
    plain = _NOT_PRINTABLE.sub(" ", str(text))
    return plain if len(plain) <= _WIDEST else f"{plain[: _WIDEST - 1]}…"
