"""The master: the trainer's own coordinator, and coordinator/main.py around it.

The store of checkpoints does one thing after the other in a thread; its answers come back some time later, and what it did is done even
if the master is gone by then. A member is lost to the coordinator when its connection ends, or when it connects again.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.final import Unsaved
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.coordinator.main import GOODBYE_SECONDS
from disttrain_trainer.coordinator.parameter_server import ParameterServerCoordinator
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.messages import Message, MessageType, beat_interval
from disttrain_trainer.net.peers import Answer, Member
from simulation.training.control import ControlServer
from simulation.training.timeline import PEER_TIMEOUT

if TYPE_CHECKING:
    from simulation.training.job import Job


class Master:
    """The process of the master: the sender and the store of its coordinator."""

    def __init__(self, job: "Job", incarnation: str) -> None:
        self._job = job
        self.incarnation = incarnation
        self.alive = True
        self.began_at = job.timeline.now
        self._leaving = False
        self._asked: deque[Callable[[], None]] = deque()
        self.tracker = Tracker(attempt=1)
        self.control = ControlServer(
            timeline=job.timeline, joined=self._joined, on_message=self._on_message, lost=self._lost
        )
        self.coordinator = ParameterServerCoordinator(
            sender=self,
            store=self if job.has_volume else None,
            tracker=self.tracker,
            config=job.config,
            incarnation=incarnation,
        )

    def start(self) -> None:
        self._decide(self.coordinator.begin)
        self._tick()

    def terminate(self) -> None:
        """SIGTERM."""
        self._leaving = True
        self._decide(self.coordinator.terminate)

    def kill(self) -> None:
        self.alive = False
        self.control.close()

    def _tick(self) -> None:
        if self.alive:
            self._decide(self.coordinator.tick)
            self.coordinator.waiting_for(self._job.timeline.now)
            self._job.timeline.after(beat_interval(PEER_TIMEOUT), self._tick)

    def _joined(self, member: Member, hello: Message) -> None:
        self._job.trace("the master admits %s: %s", member, hello)
        self._decide(lambda now: self.coordinator.joined(member, hello, now))

    def _on_message(self, member: Member, message: Message) -> None:
        self._job.trace("the master receives from %s: %s", member, message)
        self._job.oracle.received(member, message)
        self._decide(lambda now: self.coordinator.on_message(member, message, now))

    def _lost(self, member: Member) -> None:
        self._job.trace("the master loses %s", member)
        self._job.oracle.lost(member)
        self._decide(lambda now: self.coordinator.lost(member, now))

    def _decide(self, decision: Callable[[float], None]) -> None:
        """One call of the coordinator. The process ends when that says so."""
        if not self.alive:
            return
        coordinator, ended = self.coordinator, self.coordinator.ended
        try:
            decision(self._job.timeline.now)
        except Unsaved:
            self._job.master_ended(self)
            return
        self._job.oracle.decided(self)
        if coordinator.ended and not ended:
            self._job.oracle.ended(self)
            self._job.timeline.after(GOODBYE_SECONDS, partial(self._job.master_finished, self))
        elif coordinator.ended and not self.control.connected:
            self._job.master_finished(self)
        elif coordinator.released and self._leaving:
            self._leaving = False
            self._job.timeline.after(0.2, self._leave)

    def _leave(self) -> None:
        """What could be saved is saved; if the job became done meanwhile, that is how the process ends."""
        if self.coordinator.ended:
            self._job.master_finished(self)
        else:
            self._job.master_ended(self)

    # The sender.

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        self._job.trace("the master tells %s: %s %s", member, kind, fields)
        self._job.oracle.sent(member, kind, fields)
        self.control.send(member, kind, **fields)

    # The store of checkpoints.

    def find(self, answer: Answer[Manifest | None]) -> None:
        volume = self._job.volume

        def find() -> None:
            found = volume.newest
            self._answer(partial(answer, found))

        self._ask(find)

    def prepare(self, step: int, answer: Answer[str | OSError]) -> None:
        def prepare() -> None:
            result: str | OSError
            try:
                self._job.fault_of_the_volume()
                result = self._job.volume.prepare(step)
            except OSError as error:
                result = error
            self._answer(partial(answer, result))

        self._ask(prepare)

    def publish(
        self, *, step: int, parts: int, files: dict[str, str], finished: bool, answer: Answer[Manifest | OSError]
    ) -> None:
        reported = {"evaluation": self.tracker.evaluation, "model": self.tracker.model, "course": self.tracker.course}

        def publish() -> None:
            result: Manifest | OSError
            try:
                self._job.fault_of_the_volume()
                self._job.oracle.commits(step=step, parts=parts, files=files, finished=finished)
                result = self._job.volume.publish(
                    self._job.config, step=step, parts=parts, files=files, finished=finished, result=reported
                )
            except OSError as error:
                result = error
            self._job.trace("checkpoint of step %d: %s", step, result)
            self._answer(partial(answer, result))

        self._ask(publish)

    def amend(self, course: Course) -> None:
        self._ask(partial(self._job.volume.amend, course))

    def _ask(self, work: Callable[[], None]) -> None:
        self._asked.append(work)
        if len(self._asked) == 1:
            self._job.timeline.soon(self._job.pace.disk, self._work)

    def _work(self) -> None:
        if not self.alive:
            return
        self._asked[0]()
        self._asked.popleft()
        if self._asked:
            self._job.timeline.soon(self._job.pace.disk, self._work)

    def _answer(self, answer: Callable[[float], None]) -> None:
        self._job.timeline.soon(self._job.pace.requests, partial(self._decide, answer))
