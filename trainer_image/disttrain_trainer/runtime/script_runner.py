"""python run_script.py FILE ARGUMENT…: runs a file as `python FILE ARGUMENT…` does, up to an end that torch's threads survive.

A thread of gloo that drops the last reference to a tensor needs Python's lock. While the interpreter finalizes, CPython before 3.14 ends
a thread that asks for it, here in the middle of a destructor, and the process aborts (pytorch#190489, cpython#87135): a training that
succeeded answers 134, every tenth one where cores are few, and an exception of the user's is taken for a crash. No order of
destroy_process_group and `del` in the user's file prevents it. So what an end means is done in order, threads, exit handlers, the file's
own objects, and then the process leaves without finalizing, as the processes of multiprocessing do.

It is run by its path, and imports nothing of ours: the user's file sees a module path and a `__main__` of its own.
"""

import atexit
import builtins
import contextlib
import ctypes
import faulthandler
import gc
import importlib.machinery
import io
import os
import sys
import threading
import traceback
import types
import weakref
from typing import NoReturn

_UNWRITTEN = 120
"""What Python answers when its standard output could not be written."""
_STACKS_SIGNAL = 39
"""That of disttrain.api.environment."""
_CLOSE_SECONDS = 1.0
"""Seconds that one open file may take to be written. A daemon thread may hold its lock for ever."""


def execute(file: str, arguments: list[str]) -> None:
    """Executes the file as `__main__`. Raises what it raises."""
    main = types.ModuleType("__main__")
    main.__dict__.update(__annotations__={}, __builtins__=builtins, __cached__=None)
    main.__file__ = path = os.path.abspath(file)
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    sys.modules["__main__"] = main
    sys.argv = [file, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(file))
    with open(path, "rb") as source:
        code = compile(source.read(), path, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def run(file: str, arguments: list[str]) -> int:
    """Executes the file as `__main__`. Returns the exit code."""
    try:
        try:
            execute(file, arguments)
        finally:
            _flush_standard()  # what it printed comes before its traceback, where both go to one file
    except SystemExit as ended:
        return _status(ended)
    except BaseException as error:
        # As if the file's first line had no caller. The trace has no name here: this frame is behind its frames, which would then
        # go only as a cycle, and what they hold in any order: a file of theirs before what was to be written to it.
        error = error.with_traceback(_behind(_behind(error.__traceback__)))
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        try:
            sys.excepthook(type(error), error, error.__traceback__)  # the user's, perhaps, or that of a library
        except SystemExit as ended:
            return _status(ended)
        except BaseException as failed:
            failed.__context__ = None
            print("Error in sys.excepthook:", file=sys.stderr)
            traceback.print_exception(failed.with_traceback(failed.__traceback__ and failed.__traceback__.tb_next))
            print("\nOriginal exception was:", file=sys.stderr)
            traceback.print_exception(error)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _behind(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Without its first frame."""
    return trace and trace.tb_next


def leave(status: int, *, script: bool = False, timeout_seconds: float | None = None) -> NoReturn:
    """Ends the process in order, but for the interpreter. script: `__main__` is what `run` executed; what it holds is let go.

    timeout_seconds: seconds after which the process ends, though a thread, a child process or an exit handler has not. Default: no bound.
    """
    if timeout_seconds is not None:
        watch = threading.Timer(timeout_seconds, _give_up, (status, timeout_seconds))
        watch.daemon = True
        watch.start()
    steps = (
        threading._shutdown,  # type: ignore[attr-defined]  # as multiprocessing does: waits for threads that are no daemons
        atexit._run_exitfuncs,
        _flush_standard,  # as long as there is all that a file of the user's own kind may need
        _flush,  # a file that is part of a cycle may be closed before what was to be written to it
        *((_let_go, _flush) if script else ()),
    )
    for step in steps:
        try:
            step()
        except BaseException:  # such as what the handler of a signal raises: it ends the step, as it would under Python
            with contextlib.suppress(BaseException):
                traceback.print_exc()
    if not _flush_standard():
        status = _UNWRITTEN
        with contextlib.suppress(BaseException):
            print("standard output could not be written to its end", file=sys.stderr, flush=True)
    os._exit(status & 0xFF)


def _give_up(status: int, timeout_seconds: float) -> None:
    """Ends the process now, and says what would not end."""
    threads = [
        thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()
    ]
    children = [child.name for child in getattr(sys.modules.get("multiprocessing.process"), "_children", ())]
    left = ", ".join([*threads, *children]) or "an exit handler"
    with contextlib.suppress(OSError):
        os.write(2, f"the process ends {timeout_seconds:g} s after its work, though this still runs: {left}\n".encode())
    os._exit(status & 0xFF)


def _status(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    try:
        text = str(ended.code)
    except Exception:
        text = ""
    print(text, file=sys.stderr)
    return 1


def _flush_standard() -> bool:
    """Whether standard output could be written. The program may have put any object in its place; nothing that it raises goes on."""
    failed = False
    for file in (sys.stdout, sys.stderr):
        try:
            if file is not None and not getattr(file, "closed", False):
                file.flush()
        except BaseException:
            failed = failed or file is sys.stdout
    return not failed


def _let_go() -> None:
    """`__main__` goes, and with it what only it holds. What others hold stays whole: a daemon thread or a destructor may use it."""
    sys.last_type = sys.last_value = sys.last_traceback = None
    sys.excepthook = sys.__excepthook__
    main = weakref.ref(sys.modules.pop("__main__"))
    gc.collect()
    left = main()
    if left is not None and len(sys._current_frames()) == 1:
        # Another module holds it. As Python does, its values go all the same, but not while a thread may need them.
        left.__dict__.update((name, None) for name in list(left.__dict__) if name != "__builtins__")
        gc.collect()


def _flush() -> None:
    """What was written to open files is in them; text goes through the others."""
    for kinds in ((io.TextIOWrapper,), (io.BufferedWriter, io.BufferedRandom)):
        for file in gc.get_objects():
            if issubclass(type(file), kinds):  # isinstance would ask every object, and some answer with an import
                flushing = threading.Thread(target=_flush_one, args=(file,), daemon=True)
                flushing.start()
                flushing.join(_CLOSE_SECONDS)
    with contextlib.suppress(ValueError):  # the name that glibc and musl have for it
        libc = ctypes.CDLL(None)
        libc.fflush(ctypes.c_void_p.in_dll(libc, "stdout"))  # C's own exit is skipped too


def _flush_one(file: io.IOBase) -> None:
    with contextlib.suppress(BaseException):
        file.flush()


if __name__ == "__main__":
    with contextlib.suppress(
        OSError, ValueError, RuntimeError, AttributeError
    ):  # standard error is closed, or is no file
        faulthandler.register(_STACKS_SIGNAL, all_threads=True)
    leave(run(sys.argv[1], sys.argv[2:]), script=True)
