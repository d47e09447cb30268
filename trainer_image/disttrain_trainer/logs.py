"""Log lines on standard error: `time level role-index step text`, plain, one line each. Not here: metrics, progress."""

import logging
import sys


class _Position(logging.Filter):
    """Puts who speaks, and at which step, on every line."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self.who = who
        self.step = 0

    def filter(self, record: logging.LogRecord) -> bool:
        record.who = self.who
        record.step = self.step
        return True


_position = _Position("-")


def configure(who: str) -> None:
    """Begins logging for this process. `who` is the name of the process, such as worker-1."""
    _position.who = who
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_position)
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(who)s %(step)d %(message)s", datefmt="%H:%M:%S")
    )
    root = logging.getLogger("disttrain_trainer")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


def at_step(step: int) -> None:
    """Says at which step the process is, for the lines that follow."""
    _position.step = step
