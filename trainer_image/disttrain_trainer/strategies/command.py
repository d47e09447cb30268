"""The first process of a worker that runs a command whose output is read (trainer.progress). Without that the command itself is the first.

It starts the command, hands its output on unchanged, and ends as it does.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Sequence

from disttrain_trainer.errors import ProgramFailed
from disttrain_trainer.runtime import machine
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.subprocesses import Program
from disttrain_trainer.strategies import printed_progress

NOT_FOUND, NOT_RUNNABLE = 127, 126
"""What a shell answers."""


def run(process: Process, words: Sequence[str]) -> None:
    """Runs the program to its end. Raises ProgramFailed with its exit code, if that is not 0."""
    changed, started = threading.Condition(), threading.Event()

    def terminate() -> None:
        started.wait()
        for reader in readers:
            reader.hurry()
        # To the program alone, as the kubelet does: what it has started is its own to end.
        for pid in program.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    machine.on_sigterm(terminate)
    readers = printed_progress.readers(process.config, ranks=[process.index], round_number=1)
    try:
        program = Program(words, [{}], changed=changed, readers=readers, name="command")
    except FileNotFoundError:
        raise ProgramFailed(NOT_FOUND, f"trainer.command: there is no program {words[0]!r}") from None
    except OSError as error:
        raise ProgramFailed(NOT_RUNNABLE, f"trainer.command: {words[0]!r} cannot be run: {error.strerror}") from None
    started.set()
    with changed:
        changed.wait_for(program.ended)
    if code := program.result():
        raise program.failure(code)
