"""python -m disttrain_trainer: a training process of a DistTrainJob."""

import os
import signal

# The first process of a container ignores each signal that it has no handler for, and until the role has its own there are seconds
# of imports: a job that was deleted while it started would hold its nodes for the whole grace period. Pods start it with the signal
# blocked, so that none is lost before this line.
signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

from disttrain_trainer.entry import main  # noqa: E402
from disttrain_trainer.runtime.launcher import EXIT_SECONDS  # noqa: E402
from disttrain_trainer.runtime.script_runner import leave  # noqa: E402

leave(main(), timeout_seconds=EXIT_SECONDS)
