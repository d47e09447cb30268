"""`disttrain scale RUN N`: another number of workers for a local run that goes on. Not here: what the run does then (disttrain.local)."""

import sys

from disttrain.local import scaling
from disttrain.local.scaling import CannotScale


def scale(run: str, replicas: str) -> int:
    """Asks a run for so many workers; 0, or 2 for what cannot be asked, or 1 when its folder cannot be written."""
    try:
        if not (replicas.isascii() and replicas.isdecimal()):
            raise CannotScale(f"{replicas!r} is no number of workers; write one such as 3")
        scaled = scaling.ask(run, int(replicas))
    except CannotScale as error:
        print(f"scale: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"scale: {error.filename}: {error.strerror or error}; the run goes on as it is", file=sys.stderr)
        return 1
    print(f"{scaled.run}: {scaled.before} -> {scaled.after} workers")
    return 0
