"""Lines of processes, and the reader of them."""

from __future__ import annotations

import subprocess
import sys


def test_a_process_that_prints_nothing_ends_with_the_reader_of_its_pipe() -> None:
    program = (
        "import sys, time\nfrom disttrain.cli.lines import end_with_reader\n"
        "end_with_reader(sys.stdout)\nprint('up', flush=True)\ntime.sleep(60)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == "up\n"
        assert child.poll() is None
        child.stdout.close()
        assert child.wait(20) == 1
        assert child.stderr.read() == ""


def test_a_file_is_no_pipe_that_could_lose_its_reader() -> None:
    program = (
        "import sys, threading\nfrom disttrain.cli.lines import end_with_reader\n"
        "end_with_reader(open('/dev/null', 'w'))\nassert threading.active_count() == 1"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
