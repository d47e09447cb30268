"""Whether a training process that ended is started again in its pod, and how soon. Pure, but for the cell of its step.

A process that lost a peer, or that ended by a signal or by abort(), comes back within milliseconds: torch is loaded, the pod keeps its
node, its volumes and its address. What says something about the job ends the pod, and the plan decides: an exit code of the user's code,
a code that the job's failure policy names, the memory limit, and a process that ends again and again without a step between.
"""

import mmap
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from disttrain.api.environment import ExitCode
from disttrain.api.runtime import RestartsInPlace
from disttrain_trainer.errors import CRASHED

SAME_ENDS = 3
"""The same exit code at the same step so often in a row ends the pod: a crash that repeats itself must be seen."""
LONGEST_PAUSE_SECONDS = 30.0

NO_STEP = -1
"""Before the first step."""


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended."""

    code: int
    """128 + n after signal n."""
    by_signal: bool
    step: int
    """The last one that it computed."""
    out_of_memory: bool
    """The memory limit of the pod killed a process since this one began."""

    @property
    def memory_limit(self) -> bool:
        """Whether it was the memory limit that ended it."""
        return self.out_of_memory and self.by_signal and self.code == 128 + signal.SIGKILL

    def __str__(self) -> str:
        """Such as "killed by SIGKILL at step 7"."""
        where = "before its first step" if self.step == NO_STEP else f"at step {self.step}"
        if self.memory_limit:
            return f"killed by the memory limit {where}"
        if self.by_signal:
            return f"killed by {_name_of(self.code - 128)} {where}"
        return f"ended with exit code {self.code} {where}"


def restarts(ends: Sequence[End], *, codes_of_rules: Collection[int]) -> bool:
    """Whether a process is started again in its pod after the last of these ends.

    ends: of one rank in this pod, oldest first. codes_of_rules: exit codes that the job's failure policy decides about.
    """
    last = ends[-1]
    if not (last.by_signal or last.code in (ExitCode.PEER_LOST, CRASHED)):
        return False
    if last.code in codes_of_rules or last.memory_limit:
        return False
    return not repeats(ends)


def repeats(ends: Sequence[End]) -> bool:
    """Whether the last ends are the same one."""
    return len(ends) >= SAME_ENDS and len({(end.code, end.step) for end in ends[-SAME_ENDS:]}) == 1


def pause(ends: Sequence[End]) -> float:
    """Seconds until it is started again: none after a step of its own, else 1, 2, 4 … 30."""
    fruitless = 0
    for number in range(len(ends) - 1, 0, -1):
        if ends[number].step > max(end.step for end in ends[:number]):
            break
        fruitless += 1
    return min(LONGEST_PAUSE_SECONDS, 2.0 ** (fruitless - 1)) if fruitless else 0.0


def account(pod: str, ends: Sequence[tuple[datetime, End]]) -> RestartsInPlace | None:
    """What the plan counts: the ends of this pod's processes after which one was started again. None: there are none."""
    if not ends:
        return None
    failures = [(time, end) for time, end in ends if end.code != ExitCode.PEER_LOST]
    time, last = (failures or ends)[-1]
    return RestartsInPlace(
        pod=pod, restarts=len(ends), failures=len(failures), exit_code=last.code, message=str(last), time=time
    )


class StepCell:
    """The step of a process, in memory that its parent shares: it is known also of one that was killed."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, 8)).cast("q")
        self.step = NO_STEP

    @property
    def step(self) -> int:
        return self._memory[0]

    @step.setter
    def step(self, step: int) -> None:
        self._memory[0] = step


own = StepCell()
"""The step of this process; a launcher puts a cell in its place that it shares with it."""


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
