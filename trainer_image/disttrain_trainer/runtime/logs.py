"""Log lines on standard error: `time level role-index step text`, plain, one line each.

The loggers are a tree of their own. User code shares the process, and configures Python's logging as it likes: `dictConfig` disables the
loggers that exist, `logging.disable` and `basicConfig(force=True)` silence them. The lines that say why a process ended must survive that,
and also a `sys.stderr` that user code has closed or replaced.
"""

import contextlib
import logging
import os
from typing import TextIO


class _Position(logging.Filter):
    """Puts who speaks, and at which step, on every line."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self.who = who
        self.step = 0

    def filter(self, record: logging.LogRecord) -> bool:
        record.who = self.who
        record.step = self.step
        return True


class _ToPython(logging.Handler):
    """Hands lines to Python's logging, in a process that is none of a job: a test, or a program that imports a module of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


class _ToStandardError(logging.StreamHandler[TextIO]):
    """Writes lines to what standard error was when the process began."""

    def handleError(self, record: logging.LogRecord) -> None:
        """No one reads the log any more; the training does not depend on it."""


_root = logging.RootLogger(logging.INFO)
_root.addHandler(_ToPython())
_loggers = logging.Manager(_root)
_position = _Position("-")


def get_logger(name: str) -> logging.Logger:
    """The trainer's logger of this name, which Python's logging does not know."""
    return _loggers.getLogger(name)


def configure(who: str) -> None:
    """Begins logging for this process. `who` is the name of the process, such as worker-1."""
    _position.who = who
    if any(isinstance(handler, _ToStandardError) for handler in _root.handlers):
        return
    # A file number of our own: user code may close or replace sys.stderr.
    stream = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    handler = _ToStandardError(stream)
    handler.addFilter(_position)
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(who)s %(step)d %(message)s", datefmt="%H:%M:%S")
    )
    _root.handlers[:] = [handler]


def show(text: str) -> None:
    """Writes lines as they are, such as a traceback of user code, to where the log goes."""
    for handler in _root.handlers:
        if isinstance(handler, _ToStandardError):
            with contextlib.suppress(OSError):  # no one reads the log any more
                handler.stream.write(text)
                handler.stream.flush()


def at_step(step: int) -> None:
    """Says at which step the process is, for the lines that follow."""
    _position.step = step
