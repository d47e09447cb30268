"""A file runs under script_runner.py as it does under Python itself, up to its end."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from disttrain_trainer.runtime import script_runner

SCRIPTS = {
    "what it is": """
        import sys
        print(__name__, __file__, __spec__, __package__, __doc__, __cached__ if "__cached__" in globals() else None)
        print(sys.argv, sys.path[0], sys.modules["__main__"].__file__, sorted(globals()))
    """,
    "its place": "print(__file__.startswith('/'), __builtins__)",
    "its neighbours": "import neighbour; print(neighbour.NAME)",
    "its annotations": "x: int = 1; print(__annotations__)",
    "a class of its own in a pickle": """
        import pickle
        class Own: pass
        print(type(pickle.loads(pickle.dumps(Own()))) is Own)
    """,
    "a process of its own": """
        import multiprocessing
        def double(x): return 2 * x
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(double, [1, 2]))
    """,
    "its own source": "import inspect\\ndef f(): pass\\nprint(inspect.getsource(f))",
    "an exception": "def f():\\n    raise ValueError('of f')\\nf()",
    "an exception with a cause": "try:\\n    1 / 0\\nexcept ZeroDivisionError as e:\\n    raise KeyError('x') from e",
    "a hook for exceptions": "import sys; sys.excepthook = lambda *x: print('hook', x[0], x[2].tb_lineno); 1 / 0",
    "no Python": "def f(:\\n    pass",
    "another encoding": "# coding: latin-1\\nprint(len('\\u00e9'))",
    "an exit": "import sys; print('so far'); sys.exit(3)",
    "an exit with words": "import sys; sys.exit('why')",
    "an exit beyond 255": "raise SystemExit(259)",
    "an exit below 0": "raise SystemExit(-1)",
    "an exit with nothing": "raise SystemExit",
    "an interrupt": "raise KeyboardInterrupt",
    "exit handlers, last first": "import atexit; atexit.register(print, 'first'); atexit.register(print, 'second')",
    "an exit handler that fails": """
        import atexit, sys
        sys.unraisablehook = lambda failure: print(failure.exc_value)
        atexit.register(print, 'first')
        atexit.register(int, 'none')
    """,
    "a thread that goes on": """
        import threading, time
        threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()
    """,
    "a daemon that does not end": """
        import threading, time
        here = 1
        def forever():
            while here: time.sleep(0.001)
        threading.Thread(target=forever, daemon=True).start()
    """,
    "a pool that is not shut down": """
        from concurrent.futures import ThreadPoolExecutor
        pool = ThreadPoolExecutor(1)
        pool.submit(lambda: print('work'))
    """,
    "files that it does not close": """
        import gzip, zipfile, tempfile
        text = open('text', 'w'); text.write('words')
        raw = open('raw', 'wb'); raw.write(b'bytes')
        packed = gzip.open('packed', 'wb'); packed.write(b'many')
        archive = zipfile.ZipFile('archive', 'w'); archive.writestr('one', 'two')
        import neighbour; neighbour.file = open('of a module', 'w'); neighbour.file.write('words')
    """,
    "a hook for exceptions that fails": """
        import sys
        def hook(*args): raise RuntimeError('of the hook')
        sys.excepthook = hook
        1 / 0
    """,
    "a hook for exceptions that exits": "import sys; sys.excepthook = lambda *args: sys.exit(3); 1 / 0",
    "an exit with words that cannot be said": """
        class Mute:
            def __str__(self): raise RuntimeError
        raise SystemExit(Mute())
    """,
    "standard output of its own kind": """
        import sys
        class Tee:
            def __init__(self, *files): self.files = files
            def write(self, text): return [file.write(text) for file in self.files][0]
            def flush(self): [file.flush() for file in self.files]
        sys.stdout = Tee(sys.stdout, open('log', 'w'))
        sys.stderr = Tee(sys.stderr, open('errors', 'w'))
        print('words')
        raise ValueError('the end')
    """,
    "standard output that is closed": "import sys; sys.stdout.close()",
    "words of C": "import ctypes; ctypes.CDLL(None).puts(b'words')",
    "a daemon that would tell of a name that is gone": """
        import os, threading, time
        def beat(): time.time()
        def watch():
            while True:
                try: beat()
                except Exception as error:
                    print(repr(error), flush=True)
                    os._exit(17)
        threading.Thread(target=watch, daemon=True).start()
        time.sleep(0.05)
    """,
    "a daemon that waits to write": """
        import os, threading, time
        reads, writes = os.pipe()
        file = os.fdopen(writes, 'wb')
        def feed():
            while True: file.write(bytes(100_000))
        threading.Thread(target=feed, daemon=True).start()
        time.sleep(0.2)
        print('done')
    """,
    "an exception that holds a file": """
        def save():
            file = open('kept', 'w')
            file.write('words')
            raise ValueError('while it was open')
        save()
    """,
    "a file in a cycle": """
        class Own: pass
        own = Own()
        own.file = open('kept', 'w')
        own.again = own
        own.file.write('words')
    """,
    "something to let go that needs the names of its file": """
        import os
        class Held:
            def __del__(self): print(os.sep, Held.__name__)
        held = Held()
    """,
    "something to let go": """
        class Held:
            def __del__(self): print('let go')
        held = Held()
    """,
}


def ran(folder: Path, *command: str) -> tuple[object, ...]:
    """Everything that can be seen of a program, with what it left in its folder."""
    folder.mkdir()
    (folder / "neighbour.py").write_text("NAME = 'beside it'\n")
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, timeout=60, check=False)
    left = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in ("packed", "archive")  # they hold the time
    }
    whole = {name: (folder / name).stat().st_size for name in ("packed", "archive") if (folder / name).exists()}
    code = 128 - done.returncode if done.returncode < 0 else done.returncode  # as a container has it
    return code, done.stdout.decode(), done.stderr.decode(), left, whole


def buffered() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_it_is_as_under_python_itself(tmp_path: Path, text: str) -> None:
    file = tmp_path / "train.py"
    file.write_text(textwrap.dedent(text).replace("\\n", "\n"), encoding="latin-1")
    (tmp_path / "neighbour.py").write_text("NAME = 'beside it'\n")
    expected = ran(tmp_path / "python", str(file), "a", "--b")
    assert ran(tmp_path / "ours", script_runner.__file__, str(file), "a", "--b") == expected


@pytest.mark.parametrize("text", ["print('first'); 1 / 0", "print('first'); raise SystemExit('second')"])
def test_what_it_printed_comes_before_its_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.py").write_text(text)
    said = [
        subprocess.run(
            [sys.executable, *command, "train.py"],
            cwd=tmp_path,
            env=buffered(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
        ).stdout.decode()
        for command in ([], [script_runner.__file__])
    ]
    assert said[0] == said[1]
    assert said[0].startswith("first")


def test_a_safe_path_stays_safe(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import neighbour")
    done = ran(tmp_path / "ours", "-P", script_runner.__file__, str(tmp_path / "train.py"))
    assert done == ran(tmp_path / "python", "-P", str(tmp_path / "train.py"))
    assert done[0] == 1


def test_a_link_imports_from_where_its_file_is(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "train.py").write_text("import neighbour, sys; print(neighbour.NAME, sys.path[0], __file__)")
    (tmp_path / "real" / "neighbour.py").write_text("NAME = 'beside the real one'")
    (tmp_path / "train.py").symlink_to(tmp_path / "real" / "train.py")  # as the files of a ConfigMap are
    file = str(tmp_path / "train.py")
    assert ran(tmp_path / "ours", script_runner.__file__, file) == ran(tmp_path / "python", file)


def test_a_signal_ends_it_as_it_ends_python(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    done = subprocess.run([sys.executable, script_runner.__file__, str(tmp_path / "train.py")], timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM


def test_full_standard_output_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('words')")
    with open("/dev/full", "w") as full:
        codes = [
            subprocess.run(
                [sys.executable, *command, "train.py"],
                cwd=tmp_path,
                env=buffered(),
                stdout=full,
                timeout=60,
                check=False,
            ).returncode
            for command in ([], [script_runner.__file__])
        ]
    assert codes == [120, 120]
