"""`disttrain run` and what its caller gives it: streams that are slow, full, closed or gone, signals that are to be ignored, a locale."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import termios
from pathlib import Path

import pytest

from cluster.processes import wait_for
from local_runs import stub
from local_runs.command import DISTTRAIN, Finished, Started, left_behind, run

SAVES = "signal.signal(15, lambda *_: (time.sleep(0.5), os.write(1, b'saved\\n'), sys.exit(143)))\nprint('up', flush=True)\n"
FLOOD = "while True:\n    print('more ' * 1000, flush=True)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stub.install(tmp_path)
    return tmp_path


def with_stub(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder)}


def until_up(started: Started) -> None:
    wait_for("the workers", lambda: all("up\n" in started.log(f"stub-worker-{n}") for n in (0, 1)), 30)


def size_of_log(started: Started) -> int:
    file = started.run_folder() / "logs" / "stub-worker-0.log"
    return file.stat().st_size if file.exists() else 0


def test_ctrl_c_works_while_its_output_is_not_read(folder: Path) -> None:
    """The pipe is full, and stays so."""
    started = Started(folder, stub.write_job(folder, config={"worker": FLOOD}))
    wait_for("more than a pipe holds", lambda: size_of_log(started) > 1_000_000, 30)
    started.process.send_signal(signal.SIGINT)
    assert started.finish_unread(25) == 130
    assert left_behind(folder) == []


def test_it_ends_when_its_output_is_closed_and_its_processes_have_their_time(folder: Path) -> None:
    file = stub.write_job(folder, config={"worker": SAVES + "while True: print('more', flush=True); time.sleep(0.05)"})
    started = Started(folder, file)
    until_up(started)
    assert started.process.stdout is not None
    assert started.process.stderr is not None
    started.process.stdout.readline()
    started.process.stdout.close()
    with started.process.stderr as errors:
        assert started.process.wait(20) == 1
        assert errors.read() == ""
    assert "saved" in started.log("stub-worker-0")
    assert left_behind(folder) == []


def test_a_disk_that_is_full_costs_what_is_shown(folder: Path) -> None:
    file = stub.write_job(folder, config={"worker": "pass"})
    with Path("/dev/full").open("w") as full:
        done = Started(folder, file, stdout=full).finish()
    assert done.code == 0, done
    assert done.err.startswith(
        "the output cannot be written: No space left on device; the logs are in .disttrain/runs/stub-"
    )
    assert done.err.count("\n") == 1


def test_a_job_that_cannot_be_written_out_is_a_failure(folder: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = Started(folder, stub.write_job(folder, config={"worker": "pass"}), "-o", "json", stdout=full).finish()
    assert done.code == 1, done
    assert done.err.splitlines()[-1] == "disttrain: cannot write: No space left on device"


def test_closed_streams_are_no_streams(folder: Path) -> None:
    file = stub.write_job(folder, config={"worker": "print('hello')"})
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" run {file} <&- >&- 2>&-', DISTTRAIN], cwd=folder, env=with_stub(folder), check=False
    )
    assert done.returncode == 0
    (log,) = folder.glob(".disttrain/runs/*/logs/stub-worker-0.log")
    assert log.read_text().endswith("hello\n")


def on_a_terminal(folder: Path, file: str) -> tuple[Started, int]:
    """A run that has a terminal of its own, and the other end of it."""
    ours, its = pty.openpty()
    started = Started(
        folder, file, stdout=its, environment={"TERM": "xterm"}, before=lambda: fcntl.ioctl(its, termios.TIOCSCTTY, 0)
    )
    os.close(its)
    return started, ours


def test_when_its_terminal_is_closed_the_processes_have_their_time(folder: Path) -> None:
    started, terminal = on_a_terminal(folder, stub.write_job(folder, config={"worker": SAVES + "time.sleep(60)"}))
    until_up(started)
    os.close(terminal)  # SIGHUP, and EIO for whatever is written from now on
    done = started.finish(20)
    assert (done.code, done.err) == (130, "")
    assert "saved" in started.log("stub-worker-0")
    assert left_behind(folder) == []


def test_ctrl_c_works_while_a_terminal_is_stopped(folder: Path) -> None:
    started, terminal = on_a_terminal(folder, stub.write_job(folder, config={"worker": FLOOD}))
    wait_for("more than a terminal holds", lambda: size_of_log(started) > 1_000_000, 30)
    started.process.send_signal(signal.SIGINT)
    assert started.finish_unread(25) == 130
    os.close(terminal)


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(folder: Path) -> None:
    """nohup."""
    wait = "print('up', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.02)"
    started = Started(
        folder,
        stub.write_job(folder, config={"worker": wait}),
        before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    until_up(started)
    started.process.send_signal(signal.SIGHUP)
    (folder / "go").touch()
    assert started.finish().code == 0


def test_a_folder_that_cannot_be_used_is_reported_in_one_line(folder: Path) -> None:
    (folder / ".disttrain").write_text("a file")
    done = run(folder, stub.write_job(folder))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(".disttrain/runs/stub-")
    assert (
        "Not a directory; a run keeps its logs and checkpoints there: run in a folder that you may write to" in done.err
    )
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("volume", ["checkpoint", "data"])
def test_a_volume_whose_folder_cannot_be_made_is_reported_before_anything_starts(folder: Path, volume: str) -> None:
    (folder / ".disttrain" / "claims").mkdir(parents=True)
    (folder / ".disttrain" / "claims" / "full").write_text("a file")
    fields = {"persistentVolumeClaim": "full"} | ({"path": "/data"} if volume == "data" else {})
    done = run(folder, stub.write_job(folder, **{volume: {"volume": fields}}))
    assert (done.code, done.out) == (2, "")
    assert ".disttrain/claims/full" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert not list((folder / ".disttrain" / "runs").iterdir())


def test_a_locale_without_the_character_does_no_harm(folder: Path) -> None:
    """On the way in, in the environment of the processes, and on the way out."""
    file = stub.write_job(folder, config={"worker": r"os.write(1, b'50 \xe2\x96\x88\n')", "comment": "\u2588"})
    (folder / file).write_text("# \u2588\n" + (folder / file).read_text(), encoding="utf-8")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
    with (folder / file).open("rb") as text:
        done = subprocess.run(
            [DISTTRAIN, "run", "-"],
            cwd=folder,
            env={**with_stub(folder), **env},
            stdin=text,
            capture_output=True,
            check=False,
        )
    assert done.returncode == 0, done
    assert b"[worker-0] 50 ?\n" in done.stdout


def test_bytes_on_standard_input_are_wrong_input(folder: Path) -> None:
    done = subprocess.run(
        [DISTTRAIN, "run", "-"], cwd=folder, input=b"\x7fELF\xff\xfe", capture_output=True, check=False
    )
    assert Finished(done.returncode, done.stdout.decode(), done.stderr.decode()) == Finished(
        2, "", "-:1: is not UTF-8 text: invalid start byte; save it as UTF-8\n"
    )


def test_quiet_leaves_the_metrics_addresses(folder: Path) -> None:
    done = run(folder, stub.write_job(folder, config={"worker": "print('hello')"}), "-q")
    assert done.code == 0, done
    assert "hello" not in done.out
    assert "[worker-1] starts, attempt 1; metrics at http://127.0.0.1:" in done.out
