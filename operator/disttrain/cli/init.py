"""`disttrain init`: the files of a new job, from a few questions or options.

Not here: what is in the files (templates.py).
"""

import re
import sys
from pathlib import Path
from typing import Final

from disttrain.cli.lines import is_terminal
from disttrain.cli.templates import NAME, Choices, Way, files
from disttrain.client.text import one_line

_MOST_WORKERS: Final = 100
"""For which the example has a sample each."""


class WrongAnswer(Exception):
    """What is wrong with it, and what would be right."""


def init(name: str | None, way: str | None, workers: str | None, folder: str, *, force: bool) -> int:
    """Writes the files, and says what to do with them. 0, or 2 for what cannot be used. Raises OSError where they cannot be written."""
    try:
        into = Path(folder)
        asks = is_terminal(sys.stdin) and is_terminal(sys.stdout)
        choices = Choices(
            name=_name(_answer("name of the job", name, _suggested(into), asks=asks)),
            way=_way(
                _answer(
                    "strategy: DataParallel, ParameterServer, or a script of your own", way, "DataParallel", asks=asks
                )
            ),
            workers=_workers(_answer("workers", workers, "2", asks=asks)),
        )
        texts = files(choices)
        if not force and (there := [into / name for name in texts if (into / name).exists()]):
            raise WrongAnswer(
                f"{' and '.join(map(str, there))}: there already; choose another NAME, or --force to write over it"
            )
    except WrongAnswer as error:
        print(f"init: {error}", file=sys.stderr)
        return 2
    into.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (into / name).write_text(text, encoding="utf-8")
        print(into / name)
    here = "" if into == Path() else f"cd {into} && "
    print(f"next: {here}disttrain run {choices.name}.yaml", file=sys.stderr)
    return 0


def _answer(question: str, given: str | None, suggested: str, *, asks: bool) -> str:
    """What the option says, or the user, or what is suggested."""
    if given is not None or not asks:
        return suggested if given is None else given
    try:
        return input(f"{question} [{suggested}]: ").strip() or suggested
    except EOFError:
        print()
        return suggested


def _suggested(folder: Path) -> str:
    """The name of the folder, made a job's name."""
    plain = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).lstrip("-0123456789")[:40].rstrip("-")
    return plain if NAME.fullmatch(plain) else "training"


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise WrongAnswer(
            f"{one_line(text)!r} is no name of a job: at most 40 lower case letters, digits and -, such as digits-2; the first is a letter"
        )
    return text


def _way(text: str) -> Way:
    if found := next((way for way in Way if way.lower() == text.lower().replace("-", "")), None):
        return found
    raise WrongAnswer(f"{one_line(text)!r} is no strategy: choose {', '.join(Way)}")


def _workers(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and 0 < int(text) <= _MOST_WORKERS):
        raise WrongAnswer(f"{one_line(text)!r} is no number of workers for a start: choose 1 to {_MOST_WORKERS}")
    return int(text)
