"""How far the job is and how fast: step, loss, samples per second. Pure: time is given, nothing is sent."""

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from disttrain.api.runtime import Progress, ProgressBest, ProgressCheckpoint, ProgressModel, ProgressRollBacks
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.coordinator.rank_counts import RankCounts
from disttrain_trainer.coordinator.value_reports import ValueReports
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.data.schedule import DataSet, Schedule
from disttrain_trainer.net.messages import Message
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.weighted_means import Sums, WeightedMeans

log = logs.get_logger(__name__)

SPEED_WINDOW_SECONDS = 10.0
"""Seconds over which samples per second are counted."""
LOSS_WINDOW_SECONDS = 1.0
"""Seconds of the newest reports over which the loss is averaged; at least the newest report of each rank."""
LOSS_SHARE = 0.1
"""At most this share of the time since the first report: what a job of a second began with says nothing of how it ended."""
MOST_NUMBERS = 32
"""Of an evaluation: as many as a status may hold."""
MOST_BYTES = 2048
"""For the evaluation in a report: the last one, with all else, has the 4096 bytes of a termination message."""
_MOST_OF_PARTS = 1000
"""Characters of the parts that are left out: the termination message has room for so many."""
_BYTES_OF_A_NUMBER = 26
"""At most, with what JSON writes between two of them."""
_NAMED, _LONGEST_NAME = 5, 60
"""Numbers of an evaluation that a warning names, and characters of their names."""


_REPEATS = (
    "trainer.dataset is iterable and has no state_dict() and load_state_dict(): after a restart its samples are trained at least once, and "
    "not exactly once"
)


def _roll_backs(course: Course) -> ProgressRollBacks | None:
    if not course.roll_backs:
        return None
    intervals = IndexSet(course.left_out).intervals()
    parts = ",".join(f"{first}-{stop - 1}" if stop - first > 1 else str(first) for first, stop in intervals)
    if len(parts) > _MOST_OF_PARTS:
        parts = parts[: _MOST_OF_PARTS + 1].rpartition(",")[0]  # whole numbers
    return ProgressRollBacks(count=course.roll_backs, left_out_parts=parts, reason=course.rolled_back or "")


@dataclass(slots=True)
class _Entry:
    time: float
    rank: int
    samples: int
    loss: float | None
    """Sum over the samples, or one loss where a script counts none; None when the report had no loss."""
    weight: float
    """What the sum is divided by."""
    values: Sums = field(default_factory=dict)
    """Of the named values."""


class Tracker:
    """The progress of an attempt, from the reports of its workers."""

    def __init__(self, *, attempt: int) -> None:
        self.attempt = attempt
        self.step = 0
        self.total_steps: int | None = None
        self.steps_per_epoch: int | None = None
        self.left_out = 0
        """Samples that each epoch leaves out (trainer.lastBatch)."""
        self.repeats_data = False
        """The data set is a stream without a state."""
        self.data: DataSet | None = None
        """What is trained on, once a worker of parameter servers has said it."""
        self.resumed: str | None = None
        """Where this attempt is to begin, and what is remarkable about it."""
        self._shown_resumed: str | None = None
        """The same once it has begun: a job that is refused has not."""
        self.warning: str | None = None
        """See Progress.warning."""
        self.reported_epoch: int | None = None
        """What a rank said, where the master does not know the epoch's length."""
        self.world_size = 0
        self.round_number = 0
        self.lost_workers = 0
        """Lost workers of parameter servers whose parts were assigned to others: a recovery without a new round."""
        self.promotions = 0
        """How often copies of shards took the places of lost servers: the same."""
        self.redone_steps = 0
        self.began_at: int | None = None
        """The step at the first report."""
        self._fallen = deque[int]()
        """Steps that were fallen back to and not taken yet; one thread adds, another takes."""
        self.ranks = RankCounts()
        self.samples = 0
        self.gradient_norm: float | None = None
        """Of the gradient of a whole step, where no worker has it: see servers.py."""
        self.nan_loss: str | None = None
        self.max_staleness_seen: int | None = None
        self.staleness: int | None = None
        self.evaluation: dict[str, float] | None = None
        """As the user's function said it: it may hold values that are not finite."""
        self.evaluation_step: int | None = None
        self.course = Course()
        """What was decided beside the steps; with parameter servers also for the manifests."""
        self.last_checkpoint: ProgressCheckpoint | None = None
        self.best: ProgressBest | None = None
        self.model: ProgressModel | None = None
        self.finished = False
        self._last_update: datetime | None = None
        self._entries: deque[_Entry] = deque()
        self._newest: dict[int, _Entry] = {}
        self._final: dict[float, tuple[float, float]] = {}
        """Weighted loss and weight of each part of the last steps, by its number."""
        self._values = ValueReports()
        self._began: float | None = None
        self._final_speed: float | None = None

    def report(
        self,
        *,
        rank: int,
        samples: int,
        loss: float | None,
        now: float,
        weight: float | None = None,
        final: Iterable[tuple[float, float, float]] = (),
        values: Sums | None = None,
        final_values: Iterable[tuple[float, Sums]] = (),
        phases: Mapping[str, float] | None = None,
        gradient_norm: float | None = None,
    ) -> None:
        """Samples that a rank computed since its last report, and the sum of their losses.

        weight: what the sum is divided by. Default: the samples.
        final: number, weighted loss and weight of the parts of the job's last steps. values, final_values: the same of named values.
        phases: seconds since its last report in each phase of its steps.
        """
        # A part that is computed a second time counts once: the later value is of the state that stays.
        self._final |= {index: (weighted, its_weight) for index, weighted, its_weight in final}
        if self._began is None:
            self._began, self.began_at = now, self.step
        known = self._values.take(values or {}, final_values)
        entry = _Entry(now, rank, samples, loss, weight if weight is not None else samples or 1, known)
        self.samples += samples
        mean = loss / entry.weight if loss is not None and entry.weight else None
        self.ranks.take(rank, samples=samples, loss=mean, phases=phases, gradient_norm=gradient_norm)
        self._entries.append(entry)
        if loss is not None:
            self._newest[rank] = entry
        while self._entries and self._entries[0].time < now - SPEED_WINDOW_SECONDS:
            self._entries.popleft()

    def take(self, rank: int, message: Message, now: float) -> None:
        """A rank's REPORT of what it computed."""
        self.report(
            rank=rank,
            samples=int(message.get("samples") or 0),
            loss=message.get("loss"),
            now=now,
            weight=message.get("weight"),
            final=message.get("final", ()),
            values=message.get("values"),
            final_values=message.get("final_values", ()),
            phases=message.get("phases"),
            gradient_norm=message.get("gradient_norm"),
        )
        self.total_steps = message.get("total_steps") or self.total_steps

    def plan(self, schedule: Schedule) -> None:
        """The steps of the job, known once the size of its data set is."""
        self.total_steps, self.steps_per_epoch = schedule.total_steps, schedule.steps_per_epoch
        self.left_out = schedule.left_out

    def adopt(self, manifest: Manifest) -> None:
        """The training had ended: its last checkpoint says how."""
        self.evaluation, self.evaluation_step = manifest.evaluation, manifest.step
        self.course, self.model = manifest.course, manifest.model
        self.reach(manifest.step)

    def reach(self, step: int, *, wall: datetime | None = None) -> None:
        """Steps done."""
        if step > self.step:
            self.step = step
            self._last_update = wall or datetime.now(UTC)

    def fall_back(self, step: int) -> None:
        """Steps after `step` were lost and are done again."""
        self.redone_steps += max(0, self.step - step)
        if step < self.step:
            self._fallen.append(step)
        self.step = step

    def take_fall_back(self) -> int | None:
        """The lowest step that was fallen back to since the last call."""
        return min((self._fallen.popleft() for _ in range(len(self._fallen))), default=None)

    def forget(self, rank: int) -> None:
        """The rank is gone: its last loss is no longer part of the mean."""
        self._newest.pop(rank, None)

    def finish(self, now: float) -> None:
        """The job is done; the speed stays what it was."""
        if warning := self._not_shown():
            log.warning("%s", warning)
            self.warning = f"{self.warning}; {warning}" if self.warning else warning
        self._final_speed = self.samples_per_second(now)
        self.finished = True

    @property
    def reported(self) -> bool:
        """Whether any process ever reported: a script need not."""
        return self._began is not None

    @property
    def newest_gradient_norm(self) -> float | None:
        """Of the whole gradient, else that of the newest report; None for one that is not finite."""
        norm = self.gradient_norm if self.gradient_norm is not None else self.ranks.gradient_norm
        return norm if norm is not None and math.isfinite(norm) else None

    @property
    def epoch(self) -> int | None:
        """The epoch in work, from 1; at the end the last one."""
        if self.steps_per_epoch is None:
            return self.reported_epoch
        done = self.step if self.total_steps is None else min(self.step, self.total_steps - 1)
        return done // self.steps_per_epoch + 1

    @property
    def dropped_samples(self) -> int | None:
        """Samples that the epochs up to now have left out; None where none does."""
        if not self.left_out or not self.steps_per_epoch:
            return None
        return self.step // self.steps_per_epoch * self.left_out

    def loss(self) -> float | None:
        """Weighted mean of the newest reports; of a finished job that of its last steps, which no run's timing changes."""
        if self.finished and self._final:
            losses = [self._final[index] for index in sorted(self._final)]
            return sum(weighted for weighted, _ in losses) / sum(weight for _, weight in losses)
        recent = self._recent()
        weight = sum(e.weight for e in recent)
        return sum(e.loss or 0.0 for e in recent) / weight if weight else None

    def values(self) -> dict[str, float] | None:
        """Of the named values, what `loss` is of the loss."""
        if self.finished and (final := self._values.final()):
            return final
        return WeightedMeans(e.values for e in self._recent()).means or None

    def _recent(self) -> list[_Entry]:
        """The newest reports, of each rank at least one."""
        # Copies: this is asked by the thread of the HTTP server too, while reports come in.
        entries, newest_each = tuple(self._entries), tuple(self._newest.values())
        if not newest_each:
            return []
        newest, began = max(entry.time for entry in newest_each), self._began or 0.0
        since = newest - min(LOSS_WINDOW_SECONDS, LOSS_SHARE * (newest - began))
        recent = [e for e in entries if e.loss is not None and e.time > since]
        return recent + [e for e in newest_each if e.time <= since]

    def samples_per_second(self, now: float) -> float | None:
        """Of all ranks together, over the last seconds; None where no process ever said how many samples it computed."""
        if self._began is None or not self.samples:
            return None
        since = max(self._began, now - SPEED_WINDOW_SECONDS)
        # The first report covers a time before it that is not known; it counts only once there are others.
        samples = sum(e.samples for e in tuple(self._entries) if e.time > since)
        return samples / (now - since) if now > since else None

    def _shown_evaluation(self) -> dict[str, float] | None:
        """What a status can hold. JSON has no infinity: one would make all of the progress unreadable, as a message that is too long."""
        if self.evaluation is None:
            return None
        shown: dict[str, float] = {}
        room = MOST_BYTES
        for name, value in sorted(self.evaluation.items()):
            room -= len(json.dumps(name, ensure_ascii=False).encode()) + _BYTES_OF_A_NUMBER
            if math.isfinite(value) and len(shown) < MOST_NUMBERS and room >= 0:
                shown[name] = value
        return shown

    def _not_shown(self) -> str:
        """What is said of the numbers of the evaluation that the status leaves out; "" when it has all."""
        every, shown = self.evaluation or {}, self._shown_evaluation() or {}
        infinite = [f"{name:.{_LONGEST_NAME}} is {value}" for name, value in every.items() if not math.isfinite(value)]
        said = []
        if infinite:
            more = f" and {len(infinite) - _NAMED} more are not finite" if len(infinite) > _NAMED else ""
            said.append(
                f"{', '.join(infinite[:_NAMED])}{more}; JSON has no such number, and the job's status leaves it out"
            )
        if too_many := len(every) - len(infinite) - len(shown):
            said.append(f"the job's status has {len(shown)} of its numbers and no room for {too_many} more")
        return f"evaluation: {'; '.join(said)}" if said else ""

    def progress(self, *, now: float, waiting_for: str | None) -> Progress:
        """What /progress answers."""
        if self.world_size:
            self._shown_resumed = self.resumed
        speed = self._final_speed if self.finished else self.samples_per_second(now)
        return Progress(
            attempt=self.attempt,
            step=self.step,
            total_steps=self.total_steps,
            epoch=self.epoch,
            loss=self.loss(),
            values=self.values(),
            nan_loss=self.nan_loss,
            samples_per_second=speed,
            world_size=self.world_size,
            max_staleness_seen=self.max_staleness_seen,
            staleness=self.staleness,
            gradient_norm=self.newest_gradient_norm,
            evaluation=self._shown_evaluation(),
            evaluation_step=None if self.evaluation is None else self.evaluation_step,
            last_update_time=self._last_update,
            last_checkpoint=self.last_checkpoint,
            stopped=self.course.stopped,
            roll_backs=_roll_backs(self.course),
            best=self.best if self.best is not None and math.isfinite(self.best.value) else None,
            model=self.model,
            waiting_for=waiting_for,
            warning="; ".join(filter(None, (self.warning, _REPEATS if self.repeats_data else None))) or None,
            generation=self.round_number,
            redone_steps=self.redone_steps,
            dropped_samples=self.dropped_samples,
            resumed=self._shown_resumed,
            finished=self.finished,
        )
