"""Log lines on standard error, one line each: text (`time level role-index step message`), or JSON with DISTTRAIN_LOG_FORMAT=json.

The loggers are a tree of their own. User code shares the process, and configures Python's logging as it likes: `dictConfig` disables the
loggers that exist, `logging.disable` and `basicConfig(force=True)` silence them. The lines that say why a process ended must survive that,
and also a `sys.stderr` that user code has closed or replaced.
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

from disttrain.api import environment


class _Position(logging.Filter):
    """Puts the process and its step on every record."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "-"
        """Of the process, such as worker-1."""
        self.labels: Mapping[str, object] = {}
        """The process's place in the job: the fields that every line of JSON has."""
        self.step = 0

    def filter(self, record: logging.LogRecord) -> bool:
        record.process_name, record.labels, record.step = self.name, self.labels, self.step
        return True


class _Json(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, the labels of the process, step, message; exception, where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **record.__dict__["labels"],
            "step": record.__dict__["step"],
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _ToPython(logging.Handler):
    """Hands records to Python's logging in a process that belongs to no job: a test, or a program that imports one of our modules."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


class _ToStandardError(logging.StreamHandler[TextIO]):
    """Writes lines to the standard error that the process began with."""

    def handleError(self, record: logging.LogRecord) -> None:
        """The reader of the log is gone; the training does not depend on it."""


_root = logging.RootLogger(logging.INFO)
_root.addHandler(_ToPython())
_loggers = logging.Manager(_root)
_position = _Position()


def get_logger(name: str) -> logging.Logger:
    """The trainer's logger of this name, which Python's logging does not know."""
    return _loggers.getLogger(name)


def configure(name: str, labels: Mapping[str, object] | None = None) -> None:
    """Begins logging for this process, in the format that the environment names.

    name: of the process, such as worker-1. labels: the fields of every JSON line; later calls replace both.
    """
    _position.name, _position.labels = name, labels or {}
    if any(isinstance(handler, _ToStandardError) for handler in _root.handlers):
        return
    # A file number of our own: user code may close or replace sys.stderr.
    stream = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    handler = _ToStandardError(stream)
    handler.addFilter(_position)
    text = "%(asctime)s.%(msecs)03d %(levelname)s %(process_name)s %(step)d %(message)s"
    as_json = os.environ.get(environment.LOG_FORMAT) == "json"
    handler.setFormatter(_Json() if as_json else logging.Formatter(text, datefmt="%H:%M:%S"))
    _root.handlers[:] = [handler]


def show(text: str) -> None:
    """Writes a traceback of user code to where the log goes: as it is, or as the message of one line of JSON."""
    for handler in _root.handlers:
        if isinstance(handler, _ToStandardError) and isinstance(handler.formatter, _Json):
            get_logger(__name__).error("%s", text)
        elif isinstance(handler, _ToStandardError):
            with contextlib.suppress(OSError):  # the reader of the log is gone
                handler.stream.write(text)
                handler.stream.flush()


def at_step(step: int) -> None:
    """Sets the step of the lines that follow."""
    _position.step = step
