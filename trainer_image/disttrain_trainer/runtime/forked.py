"""What a process that is forked from a training process lets go of before it does anything else.

A forked process has its parent's connections: as long as it has them, their peers do not see that the parent has closed them, or is gone,
and the port that the parent listens at stays taken.
"""

import contextlib
import gc
import os
import signal
import socket
import stat

from disttrain_trainer.runtime import machine


def become_helper(parent: int) -> None:
    """This process works for its parent alone, and dies with it. It keeps none of the parent's network connections. Linux."""
    gc.freeze()  # a collection would write to every object, and copy the memory that the two share
    machine.die_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal it goes to both, and the parent decides
    machine.take_role()
    leave_connections()


def leave_connections() -> None:
    """Puts /dev/null in the place of each socket of the internet's families. Closed, its number would be given to another file, which an
    object that was forked along, such as the parent's connection, might close or write to."""
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return
    null = os.open(os.devnull, os.O_RDWR)
    try:
        for number in numbers:
            with contextlib.suppress(OSError):  # the one that listed the others
                if stat.S_ISSOCK(os.fstat(number).st_mode) and _is_of_a_network(number):
                    os.dup2(null, number, inheritable=False)
    finally:
        os.close(null)


def _is_of_a_network(number: int) -> bool:
    with socket.socket(fileno=os.dup(number)) as found:
        return found.family in (socket.AF_INET, socket.AF_INET6)
