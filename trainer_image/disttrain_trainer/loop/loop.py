"""The training loop, the same for all strategies: batch, forward, backward, exchange, report."""

import os
import time
from collections.abc import Callable

import torch

from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.loop.exchange import Exchange
from disttrain_trainer.loop.meter import Meter, NonFiniteLoss
from disttrain_trainer.loop.profiler import Profiler
from disttrain_trainer.loop.stopwatch import Stopwatch
from disttrain_trainer.loop.trained import Trained
from disttrain_trainer.model import user_code
from disttrain_trainer.model.named_values import Values
from disttrain_trainer.model.objective import LossOf, Objective
from disttrain_trainer.model.task import Task
from disttrain_trainer.runtime.metrics import Metrics

WATCHED_STEPS = 3
"""Steps from the first one on of which it is seen whether the loss calls backward() itself, and whether something draws from Python's or
numpy's generator; then one after each report."""


class StepLoss:
    """The loss of one step, as a hook gets it."""

    def __init__(self) -> None:
        self._loss = self._weight = 0.0
        self._samples = 0
        self._values: Values = {}

    def add(self, loss: float, weight: float, *, samples: int, values: Values | None) -> None:
        """A part was computed."""
        if weight:
            self._loss, self._weight = self._loss + loss * weight, self._weight + weight
        self._samples += samples
        self._values = values or {}

    def take(self, *, epoch: int) -> tuple[float | None, dict[str, float]]:
        """The mean loss of the parts since the last call, None where they had no weight; the epoch, the samples, and the named values of
        the last part."""
        loss = self._loss / self._weight if self._weight else None
        metrics = {"epoch": float(epoch), "samples": float(self._samples)}
        metrics |= {name: float(value) for name, value in self._values.items()}
        self._loss, self._weight, self._samples, self._values = 0.0, 0.0, 0, {}
        return loss, metrics


class TrainingLoop:
    """The loop of one process. For one thread."""

    def __init__(
        self,
        task: Task,
        model: Trained,
        *,
        name: str,
        metrics: Metrics,
        send: Callable[[dict[str, object]], object],
        late: bool = False,
        counts: bool = True,
        defers: bool = False,
    ) -> None:
        """send: gets the fields of a report. counts: whether the losses and samples of this process count; not where another one computes
        the same parts together with it.

        defers: a loss that is not finite is kept for `take_not_finite`, where the processes that compute with this one must hear of it.

        late: a loss is looked at one part after it is computed, because to wait for a GPU's would stall it. Not where servers would
        have taken in the gradient of a NaN by then.
        """
        self._task = task
        self._model = model
        self._metrics = metrics
        loss = task.autocast.loss(task.loss)
        self._objective: LossOf = Objective(task.model, loss, reads_weights=task.batches_per_step > 1)
        self._meter = Meter(name=name, metrics=metrics, total_steps=task.schedule.total_steps, send=send)
        self._profiler = Profiler.of(os.environ, name=name)
        self.stopwatch = Stopwatch(metrics.phase_seconds)
        self._newest: BatchPart | None = None
        """Of the last step."""
        self._late = late
        self._counts_losses = counts
        self._defers = defers
        self._not_finite: NonFiniteLoss | None = None
        self._on_step = task.hooks.on_step if task.hooks is not None else None
        self._of_step = StepLoss()
        """What a hook is told of the step; nothing is added to it where there is none."""
        self._unseen: tuple[torch.Tensor, BatchPart, float | None, Values | None] | None = None
        """A loss that was not looked at yet."""

    def adopt(self, model: Trained, objective: LossOf) -> None:
        """The modules were made again: from now on these are trained."""
        self._model, self._objective = model, objective

    def run(self, exchange: Exchange) -> None:
        """Steps until the exchange has no more parts. Raises UserError, what the user's code raises, and what the exchange raises.

        Few lines are as hot as these: each microsecond is half a per cent of a small model's step.
        """
        task, model, metrics, meter, objective = self._task, self._model, self._metrics, self._meter, self._objective
        lap, on_step = self.stopwatch.lap, self._on_step
        meter.begin(self.stopwatch.start())
        watched = WATCHED_STEPS
        profiler = self._profiler
        while parts := exchange.next_parts():
            if profiler is not None:
                profiler.before_step(parts[0].step)
            model.zero_grad()
            is_watched = watched > 0
            for assigned in parts:
                part = exchange.before(assigned)
                if part is None:
                    continue
                batch = task.batch(part)
                task.seed(part, others=is_watched)  # after it: samples may draw, or another process has loaded them
                lap("data")
                loss, weight = objective(batch, part.samples)
                if part.samples and self._counts_losses:
                    self._look_at(loss, part, weight, objective.values)
                model.refuse_unfrozen()
                if is_watched:
                    model.refuse_own_backward()
                    task.notice_draws(part)
                lap("forward")
                weighed = exchange.weigh(loss, part, weight)
                if weighed is not None:
                    weighed.backward()  # type: ignore[no-untyped-call]
                    is_watched = False
                exchange.after(part)
                lap("backward")
            if not exchange.complete():
                objective.learned_nothing()
            watched -= 1
            newest = self._newest = parts[-1]
            now = self.stopwatch.now
            metrics.steps += 1
            metrics.step_seconds.observe(now - self.stopwatch.began)
            if on_step is not None:
                self.look_at_last()
                on_step(newest.step + 1, *self._of_step.take(epoch=newest.epoch))
            is_last = newest.step + 1 == task.schedule.total_steps
            if is_last:
                self.look_at_last()
            is_due = is_last or meter.due(now)
            if is_due:
                self._verify()
                self.report()
                watched = 1
            exchange.step_done(reported=is_due)
        if profiler is not None:
            profiler.end()

    def report(self) -> None:
        """Reports to the master what was computed since the last report."""
        if self._newest is not None:
            self._meter.report(step=self._newest.step + 1, epoch=self._newest.epoch, now=time.perf_counter())

    def forget_last(self) -> None:
        """The part that was computed last does not count in the reports: another worker's copy of it does. For `complete`."""
        self._meter.forget_last()

    def before_save(self, *, waits: bool, reported: bool) -> bool:
        """Before a checkpoint of this step is written. waits: for the one before. Returns whether the step is reported now.

        Raises NonFiniteLoss.
        """
        self.look_at_last()
        if waits and not reported:
            self.report()  # else the training seems to have stopped earlier
            return True
        return reported

    def take_not_finite(self) -> NonFiniteLoss | None:
        """What `defers` has kept since the last call."""
        found, self._not_finite = self._not_finite, None
        return found

    def look_at_last(self) -> None:
        """Looks at the loss that was not looked at yet, if there is one. Raises NonFiniteLoss."""
        if self._unseen is not None:
            unseen, self._unseen = self._unseen, None
            self._count(*unseen)

    def _verify(self) -> None:
        """Raises UserError when the user's code has changed the model. Not after an evaluation, which may: the training is over then."""
        self._model.verify()
        user_code.keep_sigterm("the code of trainer.loss, trainer.model or trainer.dataset")

    def _look_at(self, loss: torch.Tensor, part: BatchPart, weight: float | None, values: Values | None) -> None:
        if self._late:
            self.look_at_last()
            self._unseen = loss.detach(), part, weight, values
        else:
            self._count(loss, part, weight, values)

    def _count(self, loss: torch.Tensor, part: BatchPart, weight: float | None, values: Values | None) -> None:
        value = loss.item()
        if weight != 0:
            try:
                self._meter.check(value, step=part.step, part=part.index)
            except NonFiniteLoss as error:
                if not self._defers:
                    raise
                self._not_finite = self._not_finite or error
                return
        if self._on_step is not None:
            self._of_step.add(value, part.samples if weight is None else weight, samples=part.samples, values=values)
        self._meter.add(part, loss=value, weight=weight, values=values)
