"""`disttrain data pack`: hands over to the trainer, which has torch and runs the user's factory (disttrain_trainer/pack.py)."""

import subprocess
import sys
from collections.abc import Sequence

from disttrain.local import machine
from disttrain.local.programs import TRAINER


def pack(arguments: Sequence[str]) -> int:
    """Packs a data set. Exit codes: 0 done, 1 the user's code or the disk failed, 2 wrong input, 130 interrupted."""
    if not (machine.importable(TRAINER) and machine.importable("torch")):
        print("data pack: it needs the trainer and torch: pip install 'disttrain[trainer]'", file=sys.stderr)
        return 2
    program = subprocess.Popen([sys.executable, "-P", "-m", f"{TRAINER}.pack", *arguments])
    while True:
        try:
            code = program.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:  # the terminal has sent it to both: its end is waited for
            continue
