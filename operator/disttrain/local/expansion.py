"""`$(NAME)` in commands and in environment variables, by the kubelet's rule. Pure. Not here: which names there are (programs.py)."""

import re
from collections.abc import Mapping

_REFERENCE = re.compile(r"\$(?:\$|\(([^)]*)\))")


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """The text with `$(NAME)` replaced and `$$` as `$`. A name that is not known stays as it is, and so does `$NAME`."""
    return _REFERENCE.sub(
        lambda found: "$" if found[1] is None else variables.get(found[1], found[0]),
        text,
    )
