"""What a training remembers of its course beside its state: the newest evaluation, and what it decided.

Each manifest has it as it was at its step. The master decides by it, and gives it to every rank and worker, from which a new master has it.
Pure.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from disttrain.api.course import EarlyStopping, Mode
from disttrain.api.runtime import JobConfig
from disttrain_trainer.errors import WrongInput

MOST_LEFT_OUT = 1 << 16
"""Parts that are left out: each message of the course names all of them, and holds a mebibyte."""


class Course(BaseModel):
    """The course up to a step."""

    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="constants")

    evaluated: int = Field(0, ge=0, lt=1 << 62)
    """The step of the newest evaluation between two steps; 0 for none. The one at the end is not among them."""
    evaluation: dict[str, float] | None = None
    """What it found; None where it could not be made."""
    is_weighted: bool = False
    """Each of its numbers came with a weight: ranks may evaluate slices of the data set."""
    record: float | None = None
    """earlyStopping: the best value so far."""
    waited: int = Field(0, ge=0, lt=1 << 62)
    """earlyStopping: evaluations since then."""
    stopped: str | None = Field(None, max_length=1000)
    """Why the training ends at the step `evaluated`; None while it goes on."""
    roll_backs: int = Field(0, ge=0, lt=1 << 62)
    """nanPolicy: how often the training went back to a checkpoint."""
    left_out: list[Annotated[int, Field(ge=0, lt=1 << 62)]] = Field(default_factory=list, max_length=1 << 20)
    """nanPolicy: the parts that count as applied without a gradient, ascending."""
    rolled_back: str | None = Field(None, max_length=1000)
    """Why the training went back the last time."""

    def after(
        self,
        step: int,
        found: dict[str, float] | None,
        config: JobConfig,
        *,
        is_weighted: bool = False,
        stop: str | None = None,
    ) -> "Course":
        """The course after an evaluation of the parameters of a step. found: None where it could not be made.

        stop: why a hook ends the training. A number that is not among them counts as NaN: who evaluates calls `require_metrics`.
        """
        stopping = config.trainer.early_stopping
        record, waited = self.record, self.waited
        if found is not None and stopping is not None:
            value = found.get(stopping.metric, math.nan)
            if is_better(value, record, stopping.mode):
                record, waited = value, 0
            else:
                waited += 1
            if waited >= stopping.patience:
                stop = stop or _no_better(stopping, record, waited)
        return self.model_copy(
            update={
                "evaluated": step,
                "evaluation": found,
                "is_weighted": is_weighted,
                "record": record,
                "waited": waited,
                "stopped": stop,
            }
        )

    def without(self, parts: Iterable[int], why: str) -> "Course":
        """The course after a roll-back that leaves these parts out."""
        left_out = sorted({*self.left_out, *parts})
        return self.model_copy(update={"roll_backs": self.roll_backs + 1, "left_out": left_out, "rolled_back": why})

    def merged(self, known: "Course") -> "Course":
        """This course with the roll-backs of another one of the same training: they are not undone by going back to a state."""
        if known.roll_backs <= self.roll_backs and set(known.left_out) <= set(self.left_out):
            return self
        newer = max(self, known, key=lambda course: course.roll_backs)
        return self.model_copy(
            update={
                "roll_backs": newer.roll_backs,
                "left_out": sorted({*self.left_out, *known.left_out}),
                "rolled_back": newer.rolled_back,
            }
        )

    def may_roll_back(self, config: JobConfig) -> bool:
        """Whether a loss that is not finite takes the training back to a checkpoint once more."""
        policy = config.trainer.nan_policy
        has_room = len(self.left_out) + config.parts_per_step <= MOST_LEFT_OUT
        return policy is not None and self.roll_backs < policy.roll_backs and has_room


def is_better(value: float, than: float | None, mode: Mode) -> bool:
    """Whether a value of a metric is better than another one. NaN never is, and anything else is better than none."""
    if math.isnan(value):
        return False
    if than is None:
        return True
    return value > than if mode is Mode.MAX else value < than


def require_metrics(names: Mapping[str, object], config: JobConfig) -> None:
    """Raises WrongInput when an evaluation lacks a number that the job names.

    names: the numbers that trainer.evaluate returned.
    """
    keep_best = config.checkpoint.keep_best if config.checkpoint is not None else None
    for field, wanted in (
        ("trainer.earlyStopping.metric", config.trainer.early_stopping),
        ("checkpoint.keepBest.metric", keep_best),
    ):
        if wanted is not None and wanted.metric not in names:
            returned = ", ".join(sorted(names)[:10]) or "no number"
            raise WrongInput(f"{field}: trainer.evaluate returned no {wanted.metric!r}; it returned {returned}")


def is_due(config: JobConfig, step: int, *, total: int) -> bool:
    """Whether the parameters of a step are evaluated between two steps. total: that of the job, whose evaluation is that of the end."""
    every = config.trainer.evaluate_every_steps
    return bool(every) and 0 < step < total and step % every == 0


def _no_better(stopping: EarlyStopping, record: float | None, waited: int) -> str:
    best = "never was a number" if record is None else f"is not better than {record:.6g}"
    times = "one evaluation" if waited == 1 else f"{waited} evaluations"
    return f"earlyStopping: {stopping.metric} {best} for {times}"
