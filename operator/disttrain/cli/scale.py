"""`disttrain scale RUN N`: another number of workers for a local run that goes on, or for a job of a cluster."""

import sys

from disttrain.local import scaling
from disttrain.local.runs import is_run, no_run
from disttrain.local.scaling import CannotScale

_DIGITS = 9
"""Of a number of workers; int() refuses one of thousands of digits with an error of its own."""


def scale(run: str, replicas: str, *, namespace: str | None = None, context: str | None = None) -> int:
    """Asks a run for so many workers; 0, or 2 for what cannot be asked, or 1 when its folder cannot be written.

    A job of a cluster is meant where a namespace or a context is given, or where this folder has no run of that name.
    """
    try:
        if not (replicas.isascii() and replicas.isdecimal() and len(replicas) <= _DIGITS):
            raise CannotScale(f"{replicas[:40]!r} is no number of workers; write one such as 3")
        of_cluster = namespace is not None or context is not None
        if of_cluster or not is_run(run):
            from disttrain.cli import cluster  # imports what takes half a second

            besides = "" if of_cluster else no_run(run)
            return cluster.scale(cluster.Where(namespace, context), run, int(replicas), besides=besides)
        scaled = scaling.ask(run, int(replicas))
    except CannotScale as error:
        print(f"scale: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"scale: {error.filename}: {error.strerror or error}; the run goes on as it is", file=sys.stderr)
        return 1
    print(f"{scaled.run}: {scaled.before} -> {scaled.after} workers")
    return 0
