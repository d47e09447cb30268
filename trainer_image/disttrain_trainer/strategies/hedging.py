"""What a worker of a job with backup workers does while it waits for a step: it asks the master for a part to compute once more.

Which part that is the master decides (coordinator/hedging.py). A part cannot be left in the middle, so a worker waits a little before it
asks: what would come at once is worth more than a copy.
"""

import time
from collections.abc import Callable

from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.messages import Waited
from disttrain_trainer.parameter_server.assignments import Assignments
from disttrain_trainer.parameter_server.client import ShardedClient, Tried
from disttrain_trainer.parameter_server.replica import Replica

FIRST_PATIENCE, PATIENCE = 1 / 16, 1 / 4
"""How long a worker waits before it asks for the first time, and before each further time, in durations of a part."""
UNKNOWN_SECONDS = 0.05
"""Taken for the duration of a part while none is known."""
LONGEST_PAUSE_SECONDS = 1.0
"""Between two questions of a worker that has no part at all."""


class Hedging:
    """Of one worker in one round. For the training thread.

    Its methods raise PeerLost and RoundOver where they ask the servers.
    """

    def __init__(
        self, *, control: ControlClient, assignments: Assignments, client: ShardedClient, replica: Replica
    ) -> None:
        self._control = control
        self._assignments = assignments
        self._client = client
        self._replica = replica
        self._seconds = 0.0
        """Mean time in which this worker computes a part, lately."""
        self._began = 0.0
        self.held: int | None = None
        """The step whose parameters the model has; None: of no step, or of a mixture."""

    def forget(self) -> None:
        """The parameters of the model may be changed: they are asked for again."""
        self.held = None

    def begin(self) -> None:
        """This worker begins to compute a part."""
        self._began = time.perf_counter()

    def computed(self) -> None:
        """The part is computed."""
        seconds = time.perf_counter() - self._began
        self._seconds += (seconds - self._seconds) * 0.2 if self._seconds else seconds

    def pull(self, step: int) -> int | None:
        """Takes over the parameters of a step, and waits for them. Returns a part to be computed before, if the master has one.

        Afterwards `held` is the step, or None where a later one has taken its place.
        """
        duration, waited = self._seconds or UNKNOWN_SECONDS, 0.0
        patience = duration * FIRST_PATIENCE
        while self.held != step and not self._assignments.is_over:
            tried = self._client.try_pull(self._replica.staging.parameters, step=step, patience_seconds=patience)
            if tried is Tried.SOME:
                self.held = None
                self.hold(step)
                return None
            if tried is Tried.ALL:
                self._replica.took_over(self._client.versions, step)
                self.held = self._common_version()
                return None
            waited += patience
            part = self._assignments.ask_for_hedge(Waited.A_PART if waited >= duration else Waited.LITTLE)
            if part is not None:
                return part
            patience = duration * PATIENCE
        return None

    def hold(self, step: int) -> bool:
        """Takes over the parameters of an unfinished step. False when a later one has taken its place."""
        if self.held != step:
            self._replica.pull(self._client, step)
            self.held = self._common_version()
        return self.held == step

    def _common_version(self) -> int | None:
        versions = set(self._client.versions)
        return versions.pop() if len(versions) == 1 else None

    def idle(self, something_new: Callable[[], bool]) -> int | None:
        """A part for a worker that has none, or None as soon as there is something new."""
        duration, began = self._seconds or UNKNOWN_SECONDS, time.perf_counter()
        pause = duration * PATIENCE
        while True:
            waited = time.perf_counter() - began
            part = self._assignments.ask_for_hedge(Waited.A_PART if waited >= duration else Waited.LITTLE)
            if part is not None:
                return part
            with self._control.changed:
                if self._control.changed.wait_for(something_new, pause):
                    return None
            self._control.check()
            pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)
