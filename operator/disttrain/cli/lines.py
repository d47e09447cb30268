"""Lines of processes on a terminal, each behind the name of its process in that one's colour, or plain where there is no terminal."""

import os
import select
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, TextIO, TypeAlias

from disttrain.api.names import Role
from disttrain.logs import LogLine

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

Shows: TypeAlias = Callable[[Iterable[LogLine]], None]

_COLOURS: Final = {
    Role.MASTER: ("bright_white",),
    Role.PARAMETER_SERVER: ("magenta", "bright_magenta", "red", "bright_red"),
    Role.WORKER: ("cyan", "green", "yellow", "blue", "bright_cyan", "bright_green", "bright_yellow", "bright_blue"),
}
"""Of a process, by its index: the same in every run, restart and command."""
_CONTROLS: Final = dict.fromkeys([*range(9), *range(10, 32), *range(127, 160)])
"""Characters that would move the cursor, or ring."""
_LEAST_WIDTH: Final = len("[worker-0]")


def is_terminal(stream: TextIO) -> bool:
    """Whether colours, and a bar, make sense there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def printer_for(stream: TextIO) -> Shows:
    """Prints lines to the stream, those of one call together. Raises OSError, as where the reader is gone."""
    width = _LEAST_WIDTH
    console = _console(stream) if is_terminal(stream) else None

    def shows(lines: Iterable[LogLine]) -> None:
        nonlocal width
        some = list(lines)
        width = max([width, *(len(line.label) + 2 for line in some)])
        if console is None:
            stream.write("".join(f"{f'[{line.label}]':{width}} {line.text}\n" for line in some))
        else:
            named = (segments(console, line.label, line.role, line.index, line.text, width) for line in some)
            console.print(Lines([segment for one in named for segment in one]), end="")
        stream.flush()

    return shows


def end_with_reader(stream: TextIO) -> None:
    """Ends this process with exit code 1 as soon as nothing reads the pipe that the stream is. Without this it shows with the next line,
    which may never come. For a process that only reads."""
    number = stream.fileno()
    if stat.S_ISFIFO(os.fstat(number).st_mode):
        threading.Thread(target=_end_when_broken, args=(number,), name="reader", daemon=True).start()


def _end_when_broken(pipe: int) -> None:
    poll = select.poll()
    poll.register(pipe, 0)  # that it is broken is always told
    poll.poll()
    os._exit(1)


def _console(stream: TextIO) -> "Console":
    from rich.console import Console  # rich takes longer to import than all the rest

    return Console(file=stream, highlight=False, soft_wrap=True)


def segments(console: "Console", label: str, role: Role, index: int, text: str, width: int) -> "Iterator[Segment]":
    """A line of a process for rich. rich obeys NO_COLOR by itself."""
    from rich.segment import Segment
    from rich.style import Style
    from rich.text import Text

    colours = _COLOURS[role]
    yield Segment(f"[{label}]".ljust(width), Style.parse(colours[index % len(colours)]))
    yield Segment(" ")
    if "\x1b" in text:
        # Its colours are kept, and nothing else that it would do to the terminal.
        yield from Text.from_ansi(text, end="").render(console)
    else:
        yield Segment(text.translate(_CONTROLS))
    yield Segment("\n")


class Lines:
    """Segments as they are. Not Text, and not markup: what a program prints in brackets is its own."""

    def __init__(self, segments: "list[Segment]") -> None:
        self._segments = segments

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Segment]":
        yield from self._segments
