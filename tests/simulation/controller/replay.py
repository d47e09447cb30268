"""`PYTHONPATH=tests .venv/bin/python -m simulation.controller.replay SEED`: lives one life again, and prints what happened in it.

With a second argument such as 0,2 only these of its faults happen. With a range (0:1000) it lives all of them, prints those that break
a promise, and how many lives and passes a second it came to; 0:1000:1 ends with the first.
"""

import sys
import time

from disttrain.controller.metrics import REGISTRY
from simulation.controller.life import calm, course_of, run
from simulation.controller.oracle import Violation

PASSES = "disttrain_operator_reconcile_duration_seconds_count"


def passes() -> float:
    """The passes of this Python process so far."""
    return REGISTRY.get_sample_value(PASSES) or 0.0


def one(seed: int, only: tuple[int, ...] | None) -> int:
    course, faults, _ = course_of(seed)
    print(course)
    for number, fault in enumerate(faults):
        print(f"fault {number}: {fault}{'' if only is None or number in only else '  (left out)'}")
    try:
        outcome = run(seed, trace=print, only=only)
    except Violation as violation:
        print(f"seed {seed}: {violation}")
        return 1
    print(f"{outcome.seconds:.0f} s, {outcome.writes} writes, {calm(course).writes} without faults; {outcome.digest}")
    return 0


def many(first: int, last: int, *, enough: int) -> int:
    began, before, wrong = time.process_time(), passes(), 0
    for seed in range(first, last):
        try:
            run(seed)
        except Violation as violation:
            wrong += 1
            print(f"seed {seed}: {violation}", flush=True)
            if wrong == enough:
                return 1
    seconds, made = time.process_time() - began, passes() - before
    print(
        f"{last - first} lives, {wrong} broke a promise; {seconds:.1f} s of CPU, {(last - first) / seconds:.0f} lives a second, "
        f"{made / (last - first):.0f} passes a life, {made / seconds:.0f} passes a second"
    )
    return bool(wrong)


def main(arguments: list[str]) -> int:
    first, *more = arguments[0].split(":")
    if more:
        return many(int(first), int(more[0]), enough=int(more[1]) if more[1:] else 0)
    return one(int(first), tuple(map(int, arguments[1].split(","))) if arguments[1:] else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
