"""A JSON object as a text that ends with its own digest.

A checkpoint's manifest has the digest of every file but its own: without this, a bit that flips in it would be read as another step, or as
another place of a tensor.
"""

import hashlib
import json
import re
from typing import Any

_DIGEST = re.compile(r',"digest":"([0-9a-f]{64})"}\s*\Z')


def with_digest(text: str) -> str:
    """The text of a JSON object that has a key, with one more: the sha256 of the text without it."""
    return f'{text[:-1]},"digest":"{_digest(text)}"}}'


def verified(text: str) -> dict[str, Any]:
    """The object of a text. One without a digest at its end, as older releases wrote it, is taken as it is.

    Raises ValueError, which says what is wrong with the text.
    """
    found = _DIGEST.search(text)
    if found is not None and found[1] != _digest(text[: found.start()] + "}"):
        raise ValueError("its digest is not that of its content")
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
