"""The termination message of a process, and the traceback that its user sees.

A user's mistake never shows our own frames.
"""

import re
import sys
import threading
import traceback
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from types import TracebackType

from disttrain.api import environment
from disttrain.api.termination import Termination
from disttrain_trainer.runtime import logs

_PACKAGE = Path(__file__).parents[1]
_EXAMPLES = _PACKAGE / "examples"

_OF_A_MODULE = re.compile(r"^(?:AttributeError|ImportError|ModuleNotFoundError): .*?(?:module|from|named) '(\w+)")

_HINTS = {
    "backward through the graph a second time": "DistTrain calls backward() on what trainer.loss returns: remove the call in trainer.loss, "
    "and keep no tensor that has a graph from one call to the next",
    "element 0 of tensors does not require grad": "trainer.loss runs without autograd, as after torch.set_grad_enabled(False)",
}

log = logs.get_logger(__name__)


class RaisedElsewhere(Exception):
    """User code raised in another process something that cannot be brought here as it was."""


_ELSEWHERE = "_disttrain_raised_elsewhere"


def note_elsewhere(error: BaseException, found: tuple[str, Termination]) -> None:
    """The error was raised in another process, where `of_user_error` found this of it."""
    setattr(error, _ELSEWHERE, found)


def write(path: Path | None, termination: Termination) -> None:
    """Leaves the termination message, where the environment names a file that can be written."""
    if path is None:
        return
    try:
        path.write_text(termination.encode())
    except OSError as error:
        log.warning("the termination message could not be written to %s: %s", path, error.strerror)


class Ending:
    """How the process ends: as the thread that comes first says."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._code: int | None = None

    def end(self, code: int, path: Path | None, message: Termination) -> int:
        """Leaves the message and returns the code, or that of the thread that came before, when it has written its own: to exit meanwhile
        would tear it."""
        with self._lock:
            if self._code is None:
                write(path, message)
                self._code = code
            return self._code


def path_in(environ: Mapping[str, str]) -> Path | None:
    """Where the environment wants the termination message, for a process that could not read the rest of it."""
    name = environ.get(environment.TERMINATION_LOG)
    return Path(name).absolute() if name else None


def is_users(filename: str) -> bool:
    """Whether a frame of this file is none of ours: the user's code, the examples, or a library that they called."""
    path = Path(filename)
    return _EXAMPLES in path.parents or not (
        _PACKAGE in path.parents or filename.startswith("<frozen") or "importlib" in path.parts
    )


def of_user_error(error: BaseException) -> tuple[str, Termination]:
    """The traceback without our frames, and the termination message: the last line, and where the user's own code raised."""
    elsewhere: tuple[str, Termination] | None = getattr(error, _ELSEWHERE, None)
    if elsewhere is not None:
        return elsewhere
    trace = _strip(error.__traceback__)
    if trace is None and not isinstance(error, SyntaxError):
        trace = error.__traceback__  # no user took part: the mistake is ours, and all of it is shown
    shown = traceback.TracebackException(type(error), error, trace, compact=True)
    last_line = list(shown.format_exception_only())[-1].strip()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    own = [f for f in frames if "site-packages" not in f.filename and "/lib/python" not in f.filename]
    where = (own or frames)[-1:]
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}:{error.lineno}"
    else:
        place = f"{where[0].filename}:{where[0].lineno}" if where else ""
    return "".join(shown.format()), Termination(
        message=last_line + _hint(last_line) + shadowing(last_line, Path(sys.path[0])), where=place
    )


def _hint(last_line: str) -> str:
    """What to add to a sentence of torch's that says what went wrong, and not in which field of the job; "" for nothing."""
    return next((f"; {hint}" for sentence, hint in _HINTS.items() if sentence in last_line), "")


def shadowing(last_line: str, folder: Path) -> str:
    """What to add to an error of a module: the user's file that hides a module of Python or a library of the same name; "" for none.

    folder: where `import` looks first.
    """
    named = _OF_A_MODULE.match(last_line)
    name = named[1] if named else ""
    files = [file for file in (folder / f"{name}.py", folder / name / "__init__.py") if name and file.is_file()]
    others = [path for path in sys.path if Path(path).resolve() != folder.resolve()]
    if not files or not (name in sys.stdlib_module_names or PathFinder.find_spec(name, others)):
        return ""
    return f"; {files[0]} hides the module {name} of Python or of a library: rename it"


def _strip(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame of the user's on."""
    while trace is not None and not is_users(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace
