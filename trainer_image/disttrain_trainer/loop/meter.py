"""The losses, samples and times of a training loop: added up at each step, reported several times a second."""

import math
import time
from collections.abc import Callable

from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.errors import UserError
from disttrain_trainer.runtime import in_place, logs
from disttrain_trainer.runtime.metrics import Metrics, Rate

REPORT_INTERVAL_SECONDS = 0.1
"""Seconds between two reports to the master, at least."""
FINAL_STEPS = 10
"""The loss of a finished job is the mean of so many last steps. While it trains the mean is over a time, which differs from run to run."""


class NonFiniteLoss(UserError):
    """The loss is NaN or infinite."""

    def __init__(self, *, name: str, step: int, loss: float) -> None:
        super().__init__(
            f"the loss is {loss} on {name} at step {step}: lower trainer.optimizer.learningRate, "
            "or look for bad values in the data and in the loss function"
        )
        self.step = step


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
        self._final: list[tuple[int, float, float]] = []
        """Of the last steps of the job: number of the part, loss x weight, weight."""
        self._samples = 0
        self._before_last = 0.0, 0.0, 0, 0
        """Losses, weight, samples and final steps before the last part was added."""
        self._earlier = 0
        """Samples of these that were computed before the loop began this time."""
        self._began = self._next_report = time.perf_counter()

    def begin(self, now: float) -> None:
        """The loop begins, or goes on after a wait that is no part of its speed. `now` is of time.perf_counter."""
        self._began, self._earlier = now, self._samples

    def check(self, loss: float, *, step: int) -> None:
        """Raises NonFiniteLoss when it is."""
        if not math.isfinite(loss):
            raise NonFiniteLoss(name=self._name, step=step, loss=loss)

    def add(self, part: BatchPart, *, loss: float, weight: float | None = None) -> None:
        """A part was computed: its mean loss, and its weight (default: the samples). Of weight 0 the loss may be anything."""
        samples = part.samples
        self._before_last = self._loss, self._weight, self._samples, len(self._final)
        in_place.own.step = part.step
        if weight is None:
            weight = samples
        if weight:
            self._loss += loss * weight
            self._weight += weight
            if part.step >= self._total_steps - FINAL_STEPS:
                self._final.append((part.index, loss * weight, weight))
        self._samples += samples

    def forget_last(self) -> None:
        """The part that was added last does not count: another worker's copy of it does. Not after a report."""
        self._loss, self._weight, self._samples, finals = self._before_last
        del self._final[finals:]

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
            self._send({
                "step": step,
                "epoch": epoch,
                "samples": samples,
                "loss": None if loss is None else self._loss,
                "total_steps": self._total_steps,
                **own,
            })  # fmt: skip
            metrics.loss = metrics.loss if loss is None else loss
            metrics.samples += samples
            metrics.samples_per_second = Rate(samples - self._earlier, now - self._began, now)
        metrics.step, metrics.epoch = step, epoch
        logs.at_step(step)
        self._loss, self._weight, self._samples, self._earlier, self._final = 0.0, 0.0, 0, 0, []
        self._began, self._next_report = now, now + REPORT_INTERVAL_SECONDS
