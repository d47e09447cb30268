"""The rounds of DataParallel and scripts: the master begins one when every member is ready, and ends it when a member is lost.

Each round has a rendezvous store of its own, so that no member reads what an earlier round wrote.
The members are ranks (our loop) or agents (a script, one in each pod). Pure: the caller gives the time, the sender sends.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from disttrain.api.runtime import ProgressBest, ProgressCheckpoint
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.coordinator.common_task import CommonTask
from disttrain_trainer.coordinator.draining import DrainingMembers
from disttrain_trainer.coordinator.evaluations import Evaluations
from disttrain_trainer.coordinator.missing_members import MissingMembers
from disttrain_trainer.coordinator.newest import newest
from disttrain_trainer.coordinator.place import Place, course_of, model_of
from disttrain_trainer.coordinator.printed_reports import PrintedReports
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.script_joining import ScriptJoining
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.net.members import MemberState, course_field
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.net.peers import Member, Sender
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)


class CollectiveCoordinator:
    """The coordinator of a training with collectives."""

    def __init__(
        self,
        *,
        sender: Sender,
        tracker: Tracker,
        members: tuple[Member, ...],
        renew_store: Callable[[Callable[[float], None]], None],
        processes: int = 1,
        saves: bool = False,
        lasting: bool = True,
        used: Callable[[], bool] | None = None,
        schedule: Callable[[int], Schedule] | None = None,
        pieces: Sequence[Sequence[int]] = (),
        evaluations: Evaluations | None = None,
    ) -> None:
        """The store is being made already, and `open` says when it is there.

        renew_store: asks for an empty one, and says when it is there; when it is called, no member has a program that uses the old one.
        processes: training processes of a member. saves: whether rank 0 can save the state when asked.
        lasting: whether a round needs its store no more once it runs. A script may make another group at any time: its round ends
        with the store, which ends with its master, as it does under torchrun.
        used: whether any process has used the store; None where the members are ranks of our own loop, which always do.
        pieces: of a sharded model, for each piece of it the ranks that hold copies of it; none where each rank holds all.
        evaluations: of a job that has some between two steps, or rolls back.
        schedule: that of a data set of so many samples, for ranks of our own loop: a master that is new at the end gets no report.
        """
        self._sender = sender
        self._tracker = tracker
        self._members = members
        self._processes = processes
        self._saves = saves
        self._lasting = lasting
        self._joining = None if used is None else ScriptJoining(sender=sender, tracker=tracker, used=used)
        self._task = CommonTask(tracker=tracker, schedule=schedule)
        self._pieces = pieces
        self._evaluations = evaluations
        self._printed = PrintedReports()
        self._reported_round = 0
        """That of the newest program of a script that reported a step."""
        self._places: dict[Member, Place] = {}
        self._missing_members = MissingMembers()
        self._renew_store = renew_store
        self._fresh = False
        """The store is empty: no round has used it."""
        self._renewing = True
        self._broken = False
        """A member of the present round was lost."""
        self._going_back = False
        """The round ends because its loss was not finite."""
        self._draining = DrainingMembers(sender)
        self._saving = False
        self.ended = False

    @property
    def released(self) -> bool:
        return self._draining.released

    def joined(self, member: Member, hello: Message, now: float) -> None:
        if self.ended:
            self._sender.send(member, MessageType.FINISH)
            return
        if member not in self._members:
            return
        self._missing_members.end(member)
        place = self._places[member] = Place(
            MemberState(hello.get("state", MemberState.READY)),
            int(hello.get("generation", 0)),
            int(hello.get("step", -1)),
            hello.get("checkpoint"),
            course=course_of(hello),
            evaluation=hello.get("evaluation"),
            model=model_of(hello),
            size=int(hello.get("members") or 0),
        )
        if self._evaluations is not None and place.state is MemberState.RUNNING:
            self._evaluations.know(place.course)
            if hello.get("found") is not None:
                self._evaluated(hello["found"], place)
            if hello.get("nan") is not None:
                self._rolls_back(member, hello["nan"], place)
            self._tell_course(self._evaluations.course)
        # The member's round is one that this master did not begin, or that ended when the member was lost.
        self._broken = self._broken or (place.state is MemberState.RUNNING and not self._lasting)
        self._compare(member, hello)
        self._advance(now)

    def lost(self, member: Member, now: float) -> None:
        place = self._places.pop(member, None)
        self._draining.forget(member)
        if place is not None and not self.ended:
            self._tracker.forget(member.rank)
            self._missed(member, place, now)
            self._advance(now)

    def _missed(self, member: Member, place: Place, now: float) -> None:
        """A member is lost: the round is broken."""
        self._missing_members.begin(member, now)
        self._broken = True

    def on_message(self, member: Member, message: Message, now: float) -> None:
        place = self._places.get(member)
        if place is None:
            return
        match message["type"]:
            case MessageType.READY if int(message.get("generation", place.round_number)) < place.round_number:
                return  # its HELLO said the same before, and a round has begun since
            case MessageType.READY:
                place.state, place.reforming, place.step = MemberState.READY, False, int(message.get("step", -1))
                place.checkpoint, place.course = message.get("checkpoint"), course_of(message)
                self._compare(member, message)
            case MessageType.FAILED:
                self._failed(member, message)
            case MessageType.DONE:
                place.state, place.done_at = MemberState.DONE, now
                place.evaluation, place.model = message.get("evaluation"), model_of(message)
                place.course = course_of(message)
            case MessageType.REPORT:
                self.reported(member.rank, message, now)
                return
            case MessageType.EVALUATED if message.get("of"):
                self._evaluated(message, place)
                return
            case MessageType.SAVED:
                self._saved(message)
            case MessageType.NAN if self._rolls_back(member, message, place):
                pass
            case MessageType.NAN:
                self._tracker.nan_loss = f"{member} at step {message['step']}"
            case MessageType.LEAVING:
                self._leaves(member)
        self._advance(now)

    def _rolls_back(self, member: Member, message: Message, place: Place) -> bool:
        """A loss was not finite: all ranks go back to the newest checkpoint. False when the job fails of it."""
        evaluations = self._evaluations
        if evaluations is None or not evaluations.has_nan_policy:
            return False
        if self._broken or place.reforming or message.get("generation") != place.round_number:
            return True  # of a round that is over: the next one does the step again
        if not evaluations.may_roll_back:
            return False
        evaluations.roll_back(message, str(member))
        log.warning(
            "the loss is not finite (%s): the training goes back to a checkpoint", evaluations.course.rolled_back
        )
        self._broken, self._going_back = True, True
        return True

    def _evaluated(self, message: Message, place: Place) -> None:
        """A rank evaluated between two steps. When all slices are there, every rank gets the course."""
        if self._evaluations is None or message["generation"] != place.round_number:
            return
        if self._evaluations.found(message):
            self._tell_course(self._evaluations.course)

    def _tell_course(self, course: Course) -> None:
        """The ranks that do not know it wait for an evaluation that is over."""
        for member, place in self._places.items():
            if place.state is MemberState.RUNNING and place.course.evaluated < course.evaluated:
                place.course = course
                self._sender.send(member, MessageType.COURSE, course=course.model_dump())

    def _leaves(self, member: Member) -> None:
        """A member received SIGTERM."""
        self._draining.add(member)
        self._save_or_release()

    def reported(self, rank: int, message: Message, now: float) -> None:
        """A rank made progress: our own loop says so, or a script by `session.report` or by what it prints."""
        tracker = self._tracker
        counted = self._printed.admit(rank, message)
        if counted is None:
            return
        message = counted
        tracker.take(rank, message, now)
        if (epoch := message.get("epoch")) is not None:
            tracker.reported_epoch = int(epoch)
        step, round_number = message.get("step"), message.get("generation")
        if step is not None and round_number is not None:  # of a script
            if round_number < self._reported_round:
                return  # the report is of a round that has ended
            if round_number > self._reported_round and step < tracker.step:
                tracker.fall_back(int(step))
            self._reported_round = round_number
        if step is not None:
            tracker.reach(int(step))

    def open(self, now: float) -> None:
        """There is an empty store: a round may begin."""
        self._fresh, self._renewing = True, False
        self._advance(now)

    def found(self, manifest: Manifest | None, now: float) -> None:
        """What the checkpoint folder held when the master started."""
        if manifest is None:
            return
        self._tracker.last_checkpoint = ProgressCheckpoint(step=manifest.step, time=manifest.time)
        self._tracker.reach(manifest.step)
        if manifest.finished:
            self._tracker.adopt(manifest)
            self._finish(now)

    def tick(self, now: float) -> None:
        if self._joining is not None and not self.ended:
            self._joining.tick(self._places, now, broken=self._broken)

    def terminate(self, now: float) -> None:
        self._draining.terminate()
        self._save_or_release()

    def waiting_for(self, now: float) -> str | None:
        return (
            None
            if self.ended
            else self._missing_members.describe([m for m in self._members if m not in self._places], now)
        )

    def _advance(self, now: float) -> None:
        """Begins, ends or completes a round, as the members' states require."""
        if self.ended:
            return
        places = list(self._places.values())
        complete = len(places) == len(self._members)
        if complete and all(p.state is MemberState.READY and p.fit for p in places):
            self._begin_soon(self._members, now)
        elif complete and not self._broken and self._is_one_round(places):
            self._run_on(places, now)
        elif self._broken or any(p.state in (MemberState.READY, MemberState.STARTING) for p in places):
            self._dissolve()

    def _begin_soon(self, members: Collection[Member], now: float) -> None:
        """Begins a round with these, or asks for the empty store that it needs."""
        if self._fresh:
            self._begin_round(members, now)
        elif not self._renewing:
            self._renewing = True
            self._renew_store(self.open)

    def _run_on(self, places: Sequence[Place], now: float) -> None:
        """All members are in one round: called after each message of a running round, and when all have joined a new master."""
        self._tracker.round_number = places[0].round_number
        self._tracker.world_size = len(places) * self._processes
        # What a rank reported to the master before this one is known from its HELLO alone: it may have no step left to report.
        self._tracker.reach(max(p.step for p in places))
        if all(p.state is MemberState.DONE for p in places):
            self._tracker.evaluation = next((p.evaluation for p in places if p.evaluation), None)
            self._tracker.evaluation_step = self._tracker.step
            self._tracker.course = places[0].course
            self._tracker.model = next((p.model for p in places if p.model), None)
            self._finish(now)

    def _compare(self, member: Member, message: Message) -> None:
        reason = self._task.misfit(member, message)
        if reason is not None:
            self._places[member].fit = False
            self._sender.send(member, MessageType.WRONG, reason=reason)

    @staticmethod
    def _is_one_round(places: list[Place]) -> bool:
        return all(
            p.state in (MemberState.RUNNING, MemberState.DONE) and p.round_number == places[0].round_number
            for p in places
        )

    def _begin_round(self, members: Collection[Member], now: float) -> None:
        round_number = 1 + max(self._tracker.round_number, *(p.round_number for p in self._places.values()))
        step, fields = self._start(members)
        if self._evaluations is not None:
            course = self._places[self._holder(members, fields)].course
            for member in members:  # a master that is new knows of roll-backs from them alone
                course = course.merged(self._places[member].course)
            self._evaluations.begin(course)
            fields |= course_field(self._evaluations.course)
        if step >= 0:
            self._tracker.fall_back(step)
            self._tracker.reach(step)
        self._broken = self._fresh = self._going_back = False
        if self._joining is not None:
            self._joining.begin(now)
        self._tracker.round_number = round_number
        self._tracker.world_size = len(members) * self._processes
        for member in members:
            place = self._places[member]
            place.state, place.round_number = MemberState.RUNNING, round_number
            self._sender.send(member, MessageType.ROUND, generation=round_number, **fields)

    def _start(self, members: Collection[Member]) -> tuple[int, dict[str, object]]:
        """The step at which a round begins, -1 when it is not known; and how the members are told where the state is."""
        steps = {member.rank: self._places[member].step for member in members}
        if not self._pieces:
            step, holders = newest(steps, [list(steps)])
            return step, {"source": min(holders, default=min(steps))}
        step, holders = newest(steps, self._pieces)
        if not holders:
            saved = self._places[self._members[0]].checkpoint
            step = -1 if saved is None else saved
        return step, {"source": 0, "step": step, "holders": holders}

    @staticmethod
    def _holder(members: Collection[Member], fields: Mapping[str, Any]) -> Member:
        """A member whose state the round begins with."""
        holders = [*fields.get("holders", ()), fields["source"]]
        return next(member for member in members if member.rank == holders[0])

    def _dissolve(self) -> None:
        self._tracker.world_size, self._tracker.warning = 0, None
        if self._joining is not None:
            self._joining.end()
        fields: Message = {}
        if self._going_back and self._evaluations is not None:
            fields = {"roll_back": True, "course": self._evaluations.course.model_dump()}
        for member, place in self._places.items():
            if place.state in (MemberState.RUNNING, MemberState.DONE) and not place.reforming:
                place.reforming = True
                self._sender.send(member, MessageType.REFORM, **fields)
        self._release()

    def _failed(self, member: Member, message: Message) -> None:
        """The first failure of a round is its root cause; a member that fails after it, or after a loss, fails because of it."""
        if not self._broken:
            self._broken = True
            log.error("%s failed: %s", member, message.get("message"))
            ended = [str(other) for other, place in self._places.items() if place.state is MemberState.DONE]
            self._sender.send(member, MessageType.FAILED, ended=ended)

    def _save_or_release(self) -> None:
        first = self._first
        writer = self._places.get(first)
        if self._saves and not self._broken and writer is not None and writer.state is MemberState.RUNNING:
            if not self._saving:
                self._saving = True
                self._sender.send(first, MessageType.SAVE)
        else:
            self._release()

    @property
    def _first(self) -> Member:
        """The member that saves."""
        return self._members[0]

    def _saved(self, message: Message) -> None:
        if message.get("step") is not None and message.get("time"):
            time = datetime.fromisoformat(message["time"])
            self._tracker.last_checkpoint = ProgressCheckpoint(step=int(message["step"]), time=time)
        if (best := message.get("best")) is not None:
            self._tracker.best = ProgressBest(step=int(best[0]), value=best[1])
        if message.get("asked"):
            self._release()

    def _release(self) -> None:
        self._saving = False
        self._draining.release()

    def _finish(self, now: float) -> None:
        if self._joining is not None:
            self._joining.finish()
        self._tracker.finish(now)
        self.ended = True
        for member in self._places:
            self._sender.send(member, MessageType.FINISH)
