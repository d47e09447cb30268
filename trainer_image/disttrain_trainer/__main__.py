"""python -m disttrain_trainer: a training process of a DistTrainJob."""

import contextlib
import faulthandler
import os
import signal


def _end_early(*_: object) -> None:
    """Ends with the message that api/termination.py writes, and is not loaded yet."""
    with contextlib.suppress(KeyError, OSError), open(os.environ["DISTTRAIN_TERMINATION_LOG"], "w") as file:
        file.write('{"message":"ended by SIGTERM"}')
    os._exit(128 + signal.SIGTERM)


# The first process of a container ignores each signal that it has no handler for, and until the role has its own there are seconds
# of imports: a job that was deleted while it started would hold its nodes for the whole grace period. Pods start it with the signal
# blocked, so that none is lost before this line.
signal.signal(signal.SIGTERM, _end_early)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

from disttrain.api.environment import STACKS_SIGNAL  # noqa: E402

with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):  # standard error is closed, or is no file
    # Written by the handler itself, so that also a process that hangs in C says where. The processes that it forks inherit it.
    faulthandler.register(STACKS_SIGNAL, all_threads=True)

from disttrain_trainer.entry import main  # noqa: E402
from disttrain_trainer.runtime.launcher import EXIT_SECONDS  # noqa: E402
from disttrain_trainer.runtime.script_runner import leave  # noqa: E402

leave(main(), timeout_seconds=EXIT_SECONDS)
