"""The training loop, the same for all strategies: batch, forward, backward, exchange, report."""

import time
from collections.abc import Callable

import torch

from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.loop.exchange import Exchange
from disttrain_trainer.loop.meter import Meter
from disttrain_trainer.loop.stopwatch import Stopwatch
from disttrain_trainer.loop.trained import Trained
from disttrain_trainer.model import user_code
from disttrain_trainer.model.task import LossOf, Objective, Task
from disttrain_trainer.runtime.metrics import Metrics

WATCHED_STEPS = 3
"""Steps from the first one on of which it is seen whether the loss calls backward() itself; then one after each report."""


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
    ) -> None:
        """send: gets the fields of a report. counts: whether the losses and samples of this process count; not where another one computes
        the same parts together with it.

        late: a loss is looked at one part after it is computed, because to wait for a GPU's would stall it. Not where servers would
        have taken in the gradient of a NaN by then.
        """
        self._task = task
        self._model = model
        self._metrics = metrics
        self._objective: LossOf = Objective(task.model, task.loss, reads_weights=task.schedule.parts_per_step > 1)
        self._meter = Meter(name=name, metrics=metrics, total_steps=task.schedule.total_steps, send=send)
        self.stopwatch = Stopwatch(metrics.phase_seconds)
        self._newest: BatchPart | None = None
        """Of the last step."""
        self._late = late
        self._counts_losses = counts
        self._unseen: tuple[torch.Tensor, BatchPart, float | None] | None = None
        """A loss that was not looked at yet."""

    def adopt(self, model: Trained, objective: LossOf) -> None:
        """The modules were made again: from now on these are trained."""
        self._model, self._objective = model, objective

    def run(self, exchange: Exchange) -> None:
        """Steps until the exchange has no more parts. Raises UserError, what the user's code raises, and what the exchange raises.

        Few lines are as hot as these: each microsecond is half a per cent of a small model's step.
        """
        task, model, metrics, meter, objective = self._task, self._model, self._metrics, self._meter, self._objective
        lap = self.stopwatch.lap
        meter.begin(self.stopwatch.start())
        watched = WATCHED_STEPS
        while parts := exchange.next_parts():
            model.zero_grad()
            is_watched = watched > 0
            for assigned in parts:
                part = exchange.before(assigned)
                if part is None:
                    continue
                task.seed(part)
                batch = task.batch(part)
                lap("data")
                loss, weight = objective(batch, part.samples)
                if part.samples and self._counts_losses:
                    self._look_at(loss, part, weight)
                model.refuse_unfrozen()
                if is_watched:
                    model.refuse_own_backward()
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
            is_last = newest.step + 1 == task.schedule.total_steps
            if is_last:
                self.look_at_last()
            is_due = is_last or meter.due(now)
            if is_due:
                self._verify()
                self.report()
                watched = 1
            exchange.step_done(reported=is_due)

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

    def look_at_last(self) -> None:
        """Looks at the loss that was not looked at yet, if there is one. Raises NonFiniteLoss."""
        if self._unseen is not None:
            unseen, self._unseen = self._unseen, None
            self._count(*unseen)

    def _verify(self) -> None:
        """Raises UserError when the user's code has changed the model. Not after an evaluation, which may: the training is over then."""
        self._model.verify()
        user_code.keep_sigterm("the code of trainer.loss, trainer.model or trainer.dataset")

    def _look_at(self, loss: torch.Tensor, part: BatchPart, weight: float | None) -> None:
        if self._late:
            self.look_at_last()
            self._unseen = loss.detach(), part, weight
        else:
            self._count(loss, part, weight)

    def _count(self, loss: torch.Tensor, part: BatchPart, weight: float | None) -> None:
        value = loss.item()
        if weight != 0:
            self._meter.check(value, step=part.step)
        self._meter.add(part, loss=value, weight=weight)
