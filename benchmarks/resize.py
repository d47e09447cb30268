"""How long an elastic job takes for a worker that joins, and for one that leaves; in turns.

    python benchmarks/resize.py         # a table: seconds, the median and the longest

Join: from the moment at which the master admits the new worker to its first step, with its model and its data (goal: 2 s). Leave: from
SIGTERM to the end of its connection to the master, with the step in work (goal: 0.5 s). The end of the pod's first process comes after it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from disttrain.api.names import Role
from restart import KINDS, WAIT_SECONDS, Pods


class ElasticPods(Pods):
    """The same processes of an elastic job. The last worker is the one that comes and goes."""

    def leave(self) -> float:
        """Seconds from SIGTERM to the end of the worker's connection to the master."""
        before = self._said("ended")
        began = time.perf_counter()
        self._victim.terminate()
        self._until(lambda: self._said("ended") > before)
        seconds = time.perf_counter() - began
        self._victim.wait(WAIT_SECONDS)
        return seconds

    def join(self) -> float:
        """Seconds from the worker's admission to its first step."""
        before = self._said("joined")
        self._victim = self._start(Role.WORKER, self._last)
        self._until(lambda: self._said("joined") > before)
        began = time.perf_counter()
        self._await_step()
        return time.perf_counter() - began

    def _said(self, what: str) -> int:
        """How often the master logged that the worker joined, or that its connection ended."""
        return (self._folder / "log").read_text(errors="replace").count(f"worker-{self._last} {what}")

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {WAIT_SECONDS:g} s")
            time.sleep(0.002)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="times that a worker leaves and joins")
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    print(f"{'strategy':<16} {'join s':>8} {'longest':>8} {'leave s':>8} {'longest':>8}")
    for name in ("DataParallel", "ParameterServer"):
        with tempfile.TemporaryDirectory() as folder:
            pods = ElasticPods(Path(folder), replace(KINDS[name], workers=options.workers, fewest=1))
            try:
                leave, join = zip(*((pods.leave(), pods.join()) for _ in range(options.rounds)), strict=True)
            finally:
                pods.close()
        figures = [figure for found in (join, leave) for figure in (statistics.median(found), max(found))]
        print(f"{name:<16} {' '.join(f'{figure:>8.2f}' for figure in figures)}")


if __name__ == "__main__":
    main()
