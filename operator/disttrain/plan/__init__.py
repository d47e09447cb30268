"""The whole behaviour of the operator as one pure function: no clock, no I/O, no randomness."""

from disttrain.plan.decide import decide, look_again
from disttrain.plan.model import Plan, Snapshot

__all__ = ["Plan", "Snapshot", "decide", "look_again"]
