"""Where each rank's stream was at a step, beside the checkpoints: streams/rank-0-of-2-step-00000100.safetensors.

Each rank writes its own for each checkpoint that is due. A checkpoint of another step, as on SIGTERM, goes with the position before it:
what a rank read between the two is read again, and passed over. No pickle: see script_state.py.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

from disttrain_trainer.checkpoint import tensor_file
from disttrain_trainer.checkpoint.script_state import StateOfScript, read_state
from disttrain_trainer.data.stream import Position
from disttrain_trainer.errors import WrongInput

_FOLDER = "streams"
_SPARE = 2
"""More of them remain than checkpoints: one of those may not hold, and one may be asked for before the next is due."""


class StreamPositions:
    """The files of one rank. Raises OSError where it writes."""

    def __init__(self, root: Path, *, rank: int, ranks: int, keep: int) -> None:
        """root: the folder of checkpoints. keep: how many of these remain."""
        self._folder = root / _FOLDER
        self._name = f"rank-{rank}-of-{ranks}-step-"
        self._keep = keep + _SPARE

    def write(self, step: int, position: Position) -> None:
        """The position before this step is read. Raises WrongInput for a state that is neither tensors nor JSON."""
        kept = StateOfScript()
        state: dict[str, Any] = {"passes": position.passes, "taken": position.taken, "state": position.state}
        try:
            kept.keep(state)
        except WrongInput as error:
            raise WrongInput(f"trainer.dataset: what its state_dict() returns cannot be saved: {error}") from None
        self._folder.mkdir(parents=True, exist_ok=True)
        tensor_file.write(self._folder / f"{self._name}{step:08d}.safetensors", kept.tensors())
        for old in sorted(self._steps())[: -self._keep]:
            with contextlib.suppress(OSError):
                (self._folder / f"{self._name}{old:08d}.safetensors").unlink()

    def newest(self, step: int) -> tuple[int, Position] | None:
        """The newest one of this step or an earlier one, and its step; one that is damaged is passed over."""
        for at in sorted((at for at in self._steps() if at <= step), reverse=True):
            with contextlib.suppress(WrongInput, KeyError, TypeError, ValueError):
                found = read_state(self._folder / f"{self._name}{at:08d}.safetensors") or {}
                return at, Position(int(found["passes"]), int(found["taken"]), found["state"])
        return None

    def _steps(self) -> list[int]:
        try:
            names = [path.name for path in self._folder.iterdir()]
        except OSError:
            return []
        found = [re.fullmatch(rf"{re.escape(self._name)}(\d+)\.safetensors", name) for name in names]
        return [int(match[1]) for match in found if match]
