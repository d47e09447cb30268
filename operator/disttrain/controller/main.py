"""`disttrain-operator`: the console script. What ends the process before or because it cannot begin, in one line and with an exit code.

Hardly an import at the top: loading the operator takes a second, and a signal must find its handler in that second.
"""

import gc
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Runs the operator. Exit code 0: ended by a signal; 1: a part of it failed; 2: it cannot start."""
    # As process 1 of a container it would not even be delivered a signal for which it has no handler.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    from disttrain.controller.settings import Settings

    settings = Settings.load(sys.argv[1:], os.environ)
    from disttrain.controller.logs import log_to_stderr
    from disttrain.controller.probes import NoPort
    from disttrain.controller.process import run
    from disttrain.kube.api import NoCluster

    log_to_stderr(settings)
    # Collecting garbage was a third of the CPU time of a burst: JSON makes many containers and hardly a cycle. What was
    # imported is never garbage, and the collector comes by less often.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    try:
        code = run(settings)
    except (NoCluster, NoPort) as error:
        print(f"disttrain-operator: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _leave(_: int, __: FrameType | None) -> None:
    """Nothing has begun that would have to be put in order; an exception here would come out of the middle of an import."""
    os._exit(0)
