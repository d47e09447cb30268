"""What a program of the suite says at its end: one line of rank 0."""

import json
import os


def say(*, steps: int, world: int, loss: float) -> None:
    # One write: the processes of a worker share its log.
    os.write(1, f"\nRESULT {json.dumps({'steps': steps, 'world': world, 'loss': round(loss, 6)})}\n".encode())
