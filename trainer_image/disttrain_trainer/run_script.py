"""python run_script.py FILE ARGUMENT…: runs a file as `python FILE ARGUMENT…` does, up to an end that torch's threads survive.

A thread of gloo that drops the last reference to a tensor needs Python's lock. While the interpreter finalizes, CPython before 3.14 ends
whoever asks for it, here in the middle of a destructor, and the process aborts (pytorch#190489, cpython#87135): a training that
succeeded answers 134, every tenth one where cores are few, and an exception of the user's is taken for a crash. No order of
destroy_process_group and `del` in the user's file prevents it. So what an end means is done in order, threads, exit handlers, the file's
own objects, and then the process leaves without finalizing, as the processes of multiprocessing do.

It is run by its path, and imports nothing of ours: the user's file sees a module path and a `__main__` of its own.
"""

import atexit
import builtins
import contextlib
import gc
import importlib.machinery
import io
import os
import sys
import threading
import traceback
import types
from typing import NoReturn

_UNWRITTEN = 120
"""What Python answers when its standard output could not be written."""


def run(file: str, arguments: list[str]) -> tuple[int, dict[str, object]]:
    """Executes the file as `__main__`. Returns the exit code, and what the file's names hold."""
    main = types.ModuleType("__main__")
    main.__dict__.update(__annotations__={}, __builtins__=builtins, __cached__=None)
    main.__file__ = path = os.path.abspath(file)
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    sys.modules["__main__"] = main
    sys.argv = [file, *arguments]
    sys.path[0] = os.path.dirname(os.path.realpath(file))
    try:
        with open(path, "rb") as source:
            code = compile(source.read(), path, "exec", dont_inherit=True)
        exec(code, main.__dict__)
    except SystemExit as ended:
        return _status(ended), main.__dict__
    except BaseException as error:
        # As if the file's first line had no caller. The hook may be the user's, or that of a library.
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        error = error.with_traceback(trace)
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
        sys.excepthook(type(error), error, trace)
        return 130 if isinstance(error, KeyboardInterrupt) else 1, main.__dict__
    return 0, main.__dict__


def leave(status: int, names: dict[str, object] | None = None) -> NoReturn:
    """Ends the process in order, but for the interpreter. names: those of the program; what they hold is let go."""
    steps = (
        threading._shutdown,  # type: ignore[attr-defined]  # as multiprocessing does: waits for threads that are no daemons
        atexit._run_exitfuncs,
        lambda: _let_go(names),
        _flush,
    )
    for step in steps:
        try:
            step()
        except BaseException:  # such as what the handler of a signal raises: it ends the step, as it would under Python
            traceback.print_exc()
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        print(f"standard output: {error}", file=sys.stderr)
        status = _UNWRITTEN
    os._exit(status)


def _status(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


def _let_go(names: dict[str, object] | None) -> None:
    if names is None:
        return
    threading.excepthook = lambda _: None  # daemons that still look for a name
    names.clear()
    gc.collect()


def _flush() -> None:
    """What was written to open files is in them; text goes through the others."""
    for kinds in ((io.TextIOWrapper,), (io.BufferedWriter, io.BufferedRandom)):
        for file in gc.get_objects():
            if issubclass(type(file), kinds):  # isinstance would ask every object, and some answer with an import
                with contextlib.suppress(OSError, ValueError):
                    file.flush()


if __name__ == "__main__":
    leave(*run(sys.argv[1], sys.argv[2:]))
