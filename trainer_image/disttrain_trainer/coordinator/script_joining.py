"""Whether the processes of a script find one another in a round, by what is seen of their store: what the log says when they do not.

A script may join late, in a way of its own, or not at all; then nothing fails, and its processes train apart or wait in torch. Pure.
"""

from collections.abc import Callable, Mapping

from disttrain_trainer.coordinator.place import Place
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.members import MemberState
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member, Sender
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

JOIN_SECONDS = 45.0
"""How long the processes of a script may leave their store unused before the log says so. Imports and data take their time first."""
ENDED_EARLY_SECONDS = 5.0
"""How long after a member's programs the others may still run before the log says so, where these ended before JOIN_SECONDS."""


class ScriptJoining:
    """Watches the present round of a script."""

    def __init__(self, *, sender: Sender, tracker: Tracker, used: Callable[[], bool]) -> None:
        """used: whether any process has used the store."""
        self._sender = sender
        self._tracker = tracker
        self._used = used
        self._join_by: float | None = None
        """When the processes are to have used their store; None once that was looked at."""
        self._join_until = 0.0
        """When the processes have joined one another, if they do."""
        self._ended_early = False
        """A member's programs ended early in this round, and the log says so."""

    def begin(self, now: float) -> None:
        """A round begins."""
        self._join_by = self._join_until = now + JOIN_SECONDS
        self._ended_early = False

    def end(self) -> None:
        """The round ends."""
        self._join_by = None

    def tick(self, places: Mapping[Member, Place], now: float, *, broken: bool) -> None:
        """places: of the members that are there. broken: the round is about to end."""
        tracker = self._tracker
        if self._join_by is not None and now >= self._join_by:
            self._join_by = None
            # A script that reports steps trains, in whatever way.
            if not tracker.reported and not self._used():
                self._warn(f"no process of the script has joined the others after {JOIN_SECONDS:.0f} s")
                for member in places:
                    self._sender.send(member, MessageType.NOT_JOINED, seconds=JOIN_SECONDS)
        elif tracker.warning is not None and not self._ended_early and self._used():
            tracker.warning = None
        if not self._ended_early and not broken and not tracker.reported:
            self._look_for_early_ends(places, now)

    def finish(self) -> None:
        """All programs have ended."""
        self._tracker.warning = None
        if not self._used():
            size = self._tracker.world_size
            self._warn(
                f"no process of the script joined the others: {size} processes trained separate models. Each of them must call "
                "torch.distributed.init_process_group() without an address of its own, which takes it from the environment"
            )

    def _look_for_early_ends(self, places: Mapping[Member, Place], now: float) -> None:
        """A program that ends before it joins has no failure: the others would wait for it in torch until that gives up."""
        running = [str(member) for member, place in places.items() if place.state is MemberState.RUNNING]
        for member, place in places.items():
            is_early = place.state is MemberState.DONE and place.done_at < self._join_until
            if is_early and running and now - place.done_at >= ENDED_EARLY_SECONDS:
                self._ended_early = True
                self._warn(
                    f"{member}: the script has ended with exit code 0, and still runs on {', '.join(running)}: if it ended before it "
                    "joined the others, they wait in init_process_group() until torch's time-out; every process must join"
                )
                return

    def _warn(self, message: str) -> None:
        if self._tracker.world_size > 1:
            self._tracker.warning = message
            log.warning("%s", message)
