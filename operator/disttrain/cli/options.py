"""What the values of options mean that more than one verb has."""

import re
from datetime import timedelta
from typing import Final

_PARTS: Final = re.compile(r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,9})s)?")


class WrongOption(Exception):
    """An option's value that means nothing; the text says what would."""


def span(text: str) -> timedelta | None:
    """A length of time such as 10m, 1h30m or 2d; None where the text is none."""
    if not text or (found := _PARTS.fullmatch(text)) is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
