"""A trace of some steps, for chrome://tracing or Perfetto: DISTTRAIN_PROFILE=10:15 in the environment of a worker traces steps 10 to 14.

torch.profiler is imported at the first traced step. A file for each process lies beside the checkpoints, or in the folder of the model.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from disttrain.api import environment
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

MOST_STEPS = 1000
"""Of a trace, which lies in memory until it is written."""
_STEPS = re.compile(r"([0-9]{1,12}):([0-9]{1,12})")


class Profiler:
    """The trace of one process. For the training thread."""

    def __init__(self, first: int, stop: int, file: Path) -> None:
        """Steps [first, stop), counted from 0. file: what is written when step stop - 1 is done."""
        self._first, self._stop, self._file = first, stop, file
        self._running: Any = None
        self._is_done = False

    @classmethod
    def of(cls, environ: Mapping[str, str], *, name: str) -> "Profiler | None":
        """What the environment asks of the process of this name. Raises WrongInput."""
        asked = environ.get(environment.PROFILE)
        if not asked:
            return None
        found = _STEPS.fullmatch(asked)
        first, stop = (int(number) for number in found.groups()) if found else (0, 0)
        if not first < stop <= first + MOST_STEPS:
            raise WrongInput(
                f"{environment.PROFILE}: {asked!r} names no steps; expected the first one and the one after the last, such as 10:15, at "
                f"most {MOST_STEPS} steps"
            )
        folder = environ.get(environment.CHECKPOINT_DIR) or environ.get(environment.MODEL_DIR) or "."
        return cls(first, stop, Path(folder) / f"profile-{name}-{first}-{stop}.json")

    def before_step(self, step: int) -> None:
        """Begins or ends the trace, as this step begins; with servers, a part of it."""
        if self._running is not None and step >= self._stop:
            self.end()
        elif self._running is None and not self._is_done and self._first <= step < self._stop:
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._running = profile(activities=activities)
            self._running.start()

    def end(self) -> None:
        """Writes the trace, if there is one. What cannot be written is logged: the training goes on."""
        running, self._running = self._running, None
        if running is None:
            return
        self._is_done = True
        running.stop()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(self._file))
        except (OSError, RuntimeError) as error:
            log.error("the trace of steps %d to %d was not written: %s", self._first, self._stop - 1, error)
        else:
            log.info("the trace of steps %d to %d is %s", self._first, self._stop - 1, self._file)
