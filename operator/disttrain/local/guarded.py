"""The run's end of the guard (guard.py): starts it, sends it the sessions, and lets it clear up. Not here: what it does then."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

from disttrain.api.environment import PREFIX
from disttrain.local import guard


@contextlib.contextmanager
def guarded(run_id: str) -> Iterator[Callable[[str], None]]:
    """Leaves nothing of the run behind: not when we end, and not when we are killed. Yields a function that sends the guard a session."""
    # We may be a part of another run. Its marks would have the guard killed with it, before it could do its work.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    program = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, run_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    assert program.stdin is not None
    pipe = program.stdin.fileno()

    def send(line: str) -> None:
        with contextlib.suppress(OSError):  # the guard was killed; the run goes on without it
            os.write(pipe, line.encode() + b"\n")

    try:
        yield send
    finally:
        program.communicate()
