"""What the user's code forks ends at SIGTERM, and its end is no SIGTERM to the process that forked it."""

import subprocess
import sys

FORKS = """
import multiprocessing, signal, sys, threading
from disttrain_trainer.runtime import machine

heard = threading.Event()
machine.on_sigterm(heard.set)

def work(up):
    up.set()
    signal.pause()

context = multiprocessing.get_context("fork")
up = context.Event()
child = context.Process(target=work, args=(up,))
child.start()
up.wait(20)
child.terminate()
child.join(20)
code, child_was_heard = child.exitcode, heard.wait(0.2)
child.kill()
signal.raise_signal(signal.SIGTERM)
sys.exit(0 if (code, child_was_heard, heard.wait(20)) == (-signal.SIGTERM, False, True) else f"{code} {child_was_heard}")
"""


def test_a_forked_child_ends_at_sigterm_and_its_parent_does_not_get_it() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
