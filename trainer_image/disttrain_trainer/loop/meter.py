"""The losses, samples and times of a training loop: added up at each step, reported several times a second."""

import math
import time
from collections.abc import Callable

from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.errors import UserError
from disttrain_trainer.model.named_values import Values
from disttrain_trainer.runtime import in_place, logs
from disttrain_trainer.runtime.metrics import Metrics, Rate
from disttrain_trainer.runtime.weighted_means import Sums, WeightedMeans

REPORT_INTERVAL_SECONDS = 0.1
"""Seconds between two reports to the master, at least."""
FINAL_STEPS = 10
"""The loss of a finished job is the mean of so many last steps. While it trains the mean is over a time, which differs from run to run."""
_MOST_BATCHES = 1 << 17
"""Of a part: more than the API allows, as localSteps or portions."""
MOST_FINAL_VALUES = 2048
"""Named values of the parts of the last steps that one report has: a message to the master holds a mebibyte."""


class NonFinite(UserError):
    """What is trained is NaN or infinite."""

    def __init__(self, message: str, *, step: int, part: int | None = None) -> None:
        """step: whose gradient, or loss, it is. part: the part of it; None: it is not known."""
        super().__init__(message)
        self.step = step
        self.part = part


class NonFiniteLoss(NonFinite):
    """The loss is NaN or infinite."""

    def __init__(self, *, name: str, step: int, loss: float, part: int | None = None) -> None:
        super().__init__(
            f"the loss is {loss} on {name} at step {step}: lower trainer.optimizer.learningRate, "
            "or look for bad values in the data and in the loss function",
            step=step,
            part=part,
        )


class Meter:
    """The counts of one loop since its last report. `send` gets the fields of a report."""

    def __init__(
        self, *, name: str, metrics: Metrics, total_steps: int, send: Callable[[dict[str, object]], object]
    ) -> None:
        self._name = name
        self._metrics = metrics
        self._total_steps = total_steps
        self._send = send
        self._loss = 0.0
        self._weight = 0.0
        """Of the sum of losses."""
        self._final: list[tuple[float, float, float]] = []
        """Of the last steps of the job: number of the part, loss x weight, weight."""
        self._values = WeightedMeans()
        self._final_values: list[tuple[float, Sums]] = []
        """The same of named values: number of the part, and by name value x weight, weight."""
        self._samples = 0
        self._before_last = 0.0, 0.0, 0, 0
        """Losses, weight, samples and final steps before the last part was added."""
        self._values_before_last: tuple[dict[str, tuple[float, float]], int] = {}, 0
        self._earlier = 0
        """Samples of these that were computed before the loop began this time."""
        self._phases: dict[str, float] = {}
        """Seconds in each phase of the steps, at the last report."""
        self._began = self._next_report = time.perf_counter()

    def begin(self, now: float) -> None:
        """The loop begins, or goes on after a wait that is no part of its speed. `now` is of time.perf_counter."""
        self._began, self._earlier = now, self._samples

    def check(self, loss: float, *, step: int, part: int | None = None) -> None:
        """Raises NonFiniteLoss when it is."""
        if not math.isfinite(loss):
            raise NonFiniteLoss(name=self._name, step=step, loss=loss, part=part)

    def add(self, part: BatchPart, *, loss: float, weight: float | None = None, values: Values | None = None) -> None:
        """A part was computed: its mean loss, its weight (default: the samples), and named values of that weight. Of weight 0 the loss may
        be anything."""
        samples = part.samples
        if not part.batch:
            self._before_last = self._loss, self._weight, self._samples, len(self._final)
            self._values_before_last = dict(self._values.sums), len(self._final_values)
        in_place.own.step = part.step
        if weight is None:
            weight = samples
        if weight:
            self._loss += loss * weight
            self._weight += weight
            if part.step >= self._total_steps - FINAL_STEPS:
                self._final.append((_number(part), loss * weight, weight))
            if values or self._values.sums:
                self._add_values(part, values or {}, weight)
        self._samples += samples

    def _add_values(self, part: BatchPart, values: Values, weight: float) -> None:
        of_part = WeightedMeans()
        of_part.add({name: float(value) for name, value in values.items()}, weight)
        self._values.merge(of_part.sums)
        if part.step >= self._total_steps - FINAL_STEPS and of_part.sums:
            self._final_values.append((_number(part), of_part.sums))

    def forget_last(self) -> None:
        """The part that was added last does not count: another worker's copy of it does. Not after a report."""
        self._loss, self._weight, self._samples, finals = self._before_last
        del self._final[finals:]
        self._values.sums, finals = self._values_before_last
        del self._final_values[finals:]

    def due(self, now: float) -> bool:
        """Whether it is time for a report. `now` is of time.perf_counter."""
        return now >= self._next_report

    def report(self, *, step: int, epoch: int, now: float) -> None:
        """Reports to the master, the metrics and the log that `step` steps are done."""
        samples, metrics = self._samples, self._metrics
        if samples:
            loss = self._loss / self._weight if self._weight else None
            own: dict[str, object] = {} if self._weight == samples else {"weight": self._weight}
            if self._final:
                own["final"] = self._final
            if self._values.sums:
                own["values"] = self._values.sums
            if self._final_values and sum(len(values) for _, values in self._final_values) <= MOST_FINAL_VALUES:
                own["final_values"] = self._final_values
            if phases := self._new_phases():
                own["phases"] = phases
            if metrics.gradient_norm is not None and math.isfinite(metrics.gradient_norm):
                own["gradient_norm"] = metrics.gradient_norm
            self._send({
                "step": step,
                "epoch": epoch,
                "samples": samples,
                "loss": None if loss is None else self._loss,
                "total_steps": self._total_steps,
                **own,
            })  # fmt: skip
            metrics.loss = metrics.loss if loss is None else loss
            metrics.values = self._values.means or metrics.values
            metrics.samples += samples
            metrics.samples_per_second = Rate(samples - self._earlier, now - self._began, now)
        metrics.step, metrics.epoch = step, epoch
        logs.at_step(step)
        self._loss, self._weight, self._samples, self._earlier, self._final = 0.0, 0.0, 0, 0, []
        self._values, self._final_values, self._values_before_last = WeightedMeans(), [], ({}, 0)
        self._began, self._next_report = now, now + REPORT_INTERVAL_SECONDS

    def _new_phases(self) -> dict[str, float]:
        """Seconds since the last report, of each phase that had any."""
        now = dict(self._metrics.phase_seconds)
        new = {name: round(now[name] - self._phases.get(name, 0.0), 6) for name in now}
        self._phases = now
        return {name: seconds for name, seconds in new.items() if seconds > 0}


def _number(part: BatchPart) -> float:
    """By which a loss of the last steps counts once: the part's number, and that of the batch in the part."""
    return part.index + part.batch / _MOST_BATCHES if part.batch else part.index
