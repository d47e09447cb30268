"""One process: its lines, its exit code, its end, and the end of all that it started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.processes import start_time, wait_for
from disttrain.api.names import Role
from disttrain.local import guard, processes
from disttrain.local.guarded import guarded
from disttrain.local.processes import Process
from local_runs.command import children, environment_of


@pytest.fixture
def process(tmp_path: Path) -> Process:
    return Process(
        name="job-worker-1",
        uid=f"test-{os.getpid()}-{time.monotonic_ns()}",
        role=Role.WORKER,
        index=1,
        attempt=1,
        metrics_port=1,
        log=tmp_path / "log",
        termination_log=tmp_path / "words",
    )


class Lines(list[str]):
    def __call__(self, process: Process, text: str) -> None:
        self.append(text)


def run(process: Process, *arguments: str, meanwhile: Callable[[], None] = lambda: None) -> Lines:
    """Runs the program to its end; `meanwhile` is called at once, or when it has printed "up" if it does."""
    lines = Lines()

    async def both() -> None:
        task = asyncio.create_task(process.run(arguments, os.environ, lines))
        if "up" in arguments[-1]:
            await asyncio.to_thread(wait_for, "the program", lambda: lines == ["up"], 20)
        meanwhile()
        await asyncio.wait_for(task, 20)

    asyncio.run(both())
    return lines


def python(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def test_lines_come_one_by_one_and_are_kept(process: Process) -> None:
    lines = run(
        process, *python("import sys; print('out', flush=True); print('err', file=sys.stderr); print('end', end='')")
    )
    assert lines == ["out", "err", "end"]
    assert process.log.read_text() == "out\nerr\nend"
    assert (process.exit_code, process.reason, process.alive) == (0, "", False)
    assert process.termination().message == ""


def test_of_a_progress_bar_the_last_state_is_shown(process: Process) -> None:
    assert run(process, *python("print('10%\\r50%\\r100%')")) == ["100%"]


def test_a_line_without_end_is_cut_and_kept_whole_in_the_log(process: Process) -> None:
    lines = run(process, *python("print('x' * 1_000_000)"))
    assert max(map(len, lines)) <= 2 * 64 * 1024
    assert process.log.stat().st_size == 1_000_001


def test_bytes_that_are_no_text_do_no_harm(process: Process) -> None:
    assert run(process, *python("import os; os.write(1, b'\\xff\\xfe\\n')")) == ["\ufffd\ufffd"]


def test_the_termination_message_is_the_one_that_it_left(process: Process) -> None:
    run(
        process,
        *python(f"open({str(process.termination_log)!r}, 'w').write('{{\"message\": \"boom\"}}'); raise SystemExit(3)"),
    )
    assert (process.exit_code, process.reason, process.termination().message) == (3, "Error", "boom")


def test_without_a_message_the_last_line_is_the_last_word(process: Process) -> None:
    run(process, *python("raise ValueError('of the user')"))
    assert process.termination().message == "ValueError: of the user"


def test_a_signal_is_named_as_a_shell_names_it(process: Process) -> None:
    run(process, *python("import os; os.kill(os.getpid(), 9)"))
    assert process.exit_code == 137


@pytest.mark.parametrize(
    ("program", "arguments", "code"),
    [("/nowhere/at/all", (), 127), ("/etc/passwd", (), 126), ("/bin/echo", ("a\0b",), 126)],
)
def test_a_program_that_cannot_be_started_is_a_failure_of_its_own(
    process: Process, program: str, arguments: tuple[str, ...], code: int
) -> None:
    lines = run(process, program, *arguments)
    assert process.exit_code == code
    assert process.reason == "StartError"
    assert program in process.termination().message
    assert lines == [process.termination().message]


def test_stop_asks_first(process: Process) -> None:
    program = python(
        "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); signal.pause()"
    )
    run(process, *program, meanwhile=lambda: process.stop(10))
    assert process.exit_code == 7


def test_who_does_not_listen_is_killed_after_the_grace_period(process: Process) -> None:
    program = python("import signal; signal.signal(15, 1); print('up', flush=True); signal.pause(); signal.pause()")
    began = time.monotonic()
    run(process, *program, meanwhile=lambda: process.stop(0.3))
    assert process.exit_code == 137
    assert 0.2 < time.monotonic() - began < 5


COUNTS_SIGTERM = (
    "import signal, sys, time; signal.signal(15, lambda *_: print('asked', flush=True)); print('up', flush=True)\n"
    "for _ in range({tenths}): time.sleep(0.1)"
)


def test_who_is_stopped_again_is_asked_once(process: Process) -> None:
    """A second SIGTERM would break into the checkpoint that the first one asked for."""

    def stop_twice() -> None:
        process.stop(30)
        asyncio.get_running_loop().call_later(0.3, process.stop, 40)

    lines = run(process, *python(COUNTS_SIGTERM.format(tenths=8)), meanwhile=stop_twice)
    assert (lines, process.exit_code) == (["up", "asked"], 0)


def test_a_second_stop_shortens_the_grace_period_and_never_extends_it(process: Process) -> None:
    def stop_three_times() -> None:
        for seconds in (30, 0.3, 30):
            process.stop(seconds)

    lines = run(process, *python(COUNTS_SIGTERM.format(tenths=100)), meanwhile=stop_three_times)
    assert (lines, process.exit_code) == (["up", "asked"], 137)


def test_a_stop_before_the_start_is_not_forgotten(process: Process) -> None:
    program = python("import time; time.sleep(60)")
    run(process, *program, meanwhile=lambda: process.stop(5))
    assert process.exit_code == 143


def gone(pid: int) -> bool:
    return start_time(pid) is None


def test_the_end_of_the_first_process_is_the_end_of_all(process: Process, tmp_path: Path) -> None:
    """As in a container. The child is in a session of its own, ignores signals, and holds the pipe."""
    ready = tmp_path / "ready"
    child = (
        "import pathlib, signal, time; [signal.signal(s, 1) for s in (1, 2, 15)]; print('child', flush=True); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    parent = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)
while not os.path.exists({str(ready)!r}):
    time.sleep(0.01)
"""
    lines = run(process, *python(parent))
    assert lines == ["child"]
    assert process.exit_code == 0
    assert guard.belonging("DISTTRAIN_POD_UID", process.uid) == []


def test_a_child_with_an_environment_of_its_own_ends_too(process: Process) -> None:
    """It has lost the mark, but not the session."""
    lines = run(process, *python("import subprocess; print(subprocess.Popen(['/bin/sleep', '60'], env={}).pid)"))
    assert process.exit_code == 0
    assert gone(int(lines[0]))


def test_the_last_lines_of_a_process_arrive_also_where_its_pipe_is_full_at_its_end(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under load: the reader is slower than the program."""
    program = (
        "import fcntl\nassert fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20) == 1 << 20\n"
        "for number in range(100): print(number, 'x' * 10_000)"
    )
    monkeypatch.setattr(processes, "kill_all", lambda *_: 0)  # it takes time, in which lines are taken
    lines: list[str] = []

    def slow(_: Process, text: str) -> None:
        time.sleep(0.005)
        lines.append(text)

    asyncio.run(process.run(python(program), os.environ, slow))
    assert [line.split()[0] for line in lines] == [str(number) for number in range(100)]


def test_a_process_that_got_away_and_prints_is_not_waited_for(process: Process) -> None:
    child = "import os; print('away', os.getpid(), flush=True)\nwhile True: print('x' * 1000)"
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True, env={{}})"
    )
    lines = run(process, *python(f"{parent}; import time; time.sleep(0.5)"))
    away = int(lines[0].split()[1])
    assert process.exit_code == 0
    wait_for("its end by SIGPIPE", lambda: gone(away), 10)


def test_a_full_disk_costs_the_log_and_not_the_process(process: Process) -> None:
    process.log = Path("/dev/full")
    lines = run(process, *python("print('a', flush=True); import time; time.sleep(0.1); print('b')"))
    assert lines == ["its log ends here: No space left on device", "a", "b"]
    assert process.exit_code == 0


PARENT_OF_A_GUARD = """
import os, subprocess, sys, time
from disttrain.local import guard
from disttrain.local.guarded import guarded
g = subprocess.Popen([sys.executable, "-I", "-S", guard.__file__, sys.argv[1]], stdin=subprocess.PIPE)
def start(*words, **how):
    return subprocess.Popen(words, start_new_session=True, **how).pid
"""


def killed_after(program: str, argument: str) -> list[int]:
    """The pids that a parent of a guard printed before it was killed."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT_OF_A_GUARD + program + "\ntime.sleep(60)", argument],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout as said:
        pids = [int(pid) for pid in said.readline().split()]
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    return pids


def test_the_guard_clears_up_when_the_run_is_killed() -> None:
    """A parent that starts a guard and a marked child with a marked, detached grandchild; SIGKILL; nothing remains."""
    value = f"test-{os.getpid()}-{time.monotonic_ns()}"
    child = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True); time.sleep(60)"
    program = f"""
marked = {{**os.environ, guard.MARK: sys.argv[1]}}
child = subprocess.Popen([sys.executable, "-c", {child!r}], env=marked, stdout=subprocess.PIPE, start_new_session=True, text=True)
print(child.pid, child.stdout.readline(), end="", flush=True)
"""
    pids = killed_after(program, value)
    assert len(pids) == 2
    wait_for("nothing to remain", lambda: all(map(gone, pids)), 10)


def test_the_guard_knows_sessions_and_which_of_them_are_over() -> None:
    program = """
pids = [start("sleep", "60", env={}) for _ in range(2)]
g.stdin.write("".join([f"+{pid}\\n" for pid in pids] + [f"-{pids[1]}\\n"]).encode())
g.stdin.flush()
print(*pids, flush=True)
"""
    unmarked, over = killed_after(program, "no-run")
    try:
        wait_for("the session to end", lambda: gone(unmarked), 10)
        assert not gone(over)
    finally:
        os.kill(over, signal.SIGKILL)


def test_a_number_that_was_given_to_another_session_is_left_alone() -> None:
    own = start_time(os.getpid())
    assert own is not None
    assert guard.is_same_session(os.getpid(), own)
    assert not guard.is_same_session(os.getpid(), "1")
    assert guard.is_same_session(2**30, own), "its leader has ended; its members may not have"


def test_the_guard_of_a_run_within_a_run_outlives_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outer run kills all that carries its marks: the inner guard still has to do its work then."""
    monkeypatch.setenv(guard.MARK, "outer")
    monkeypatch.setenv("DISTTRAIN_POD_UID", "outer")
    with guarded("inner"):
        # The kernel lets go of the parent a moment before it has put the new program's words in their place.
        (pid,) = wait_for(
            "the guard",
            lambda: [pid for pid in children(os.getpid()) if b"guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes()],
            10,
        )
        assert [name for name in environment_of(pid) if name.startswith("DISTTRAIN_")] == []
        assert os.getsid(pid) == pid
