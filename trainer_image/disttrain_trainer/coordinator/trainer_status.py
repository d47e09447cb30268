"""What a report in the form of Kubeflow's Trainer says (KEP-2779 of kubeflow/trainer; transformers' KubeflowCallback), as a REPORT message.

The form has a percentage, seconds and named numbers as text; steps are among those under the names that programs use. Pure.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from disttrain_trainer.net.messages import Message, MessageType

_STEP: Final = ("current_step", "global_step", "step")
_TOTAL: Final = ("total_steps", "max_steps")
_LOSS: Final = ("loss", "train_loss")
_EPOCH: Final = ("current_epoch", "epoch")
_LARGEST: Final = 1 << 53
"""Below it a number is one that a report of the master takes (api.runtime.NonNegative)."""


class _Metric(BaseModel):
    name: Annotated[str, Field(max_length=1024)]
    value: Annotated[str, Field(max_length=1024)]


class _Status(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    percentage: Annotated[int | None, Field(ge=0, le=100, alias="progressPercentage")] = None
    metrics: Annotated[tuple[_Metric, ...], Field(max_length=256)] | None = None


class TrainerStatus(BaseModel):
    """The body of a report. Fields that are not known are left out."""

    status: Annotated[_Status, Field(alias="trainerStatus")]

    @classmethod
    def parse(cls, body: bytes) -> "TrainerStatus":
        """Raises ValueError that says what is wrong."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None

    def number(self, names: Sequence[str]) -> float | None:
        """The first of these numbers that is there and finite."""
        metrics = {metric.name: metric.value for metric in self.status.metrics or ()}
        for name in names:
            try:
                value = float(metrics[name])
            except (KeyError, ValueError):
                continue
            if math.isfinite(value) and abs(value) < _LARGEST:
                return value
        return None


class TrainerStatusReports:
    """The reports of one program, each as a REPORT message."""

    def __init__(self) -> None:
        self._total: int | None = None

    def message(self, report: TrainerStatus) -> Message:
        """What a report adds. Without any number of steps the percentage stands for them, of 100."""
        step, total = report.number(_STEP), report.number(_TOTAL)
        percentage = report.status.percentage
        if total is not None and total >= 1:
            self._total = int(total)
        elif step is None and self._total is None and percentage is not None:
            self._total = 100
        if step is None and percentage is not None and (percentage == 100 or self._total == 100):
            # transformers names no step at the end, and before the first one.
            step = percentage * (self._total or 100) // 100
        epoch = report.number(_EPOCH)
        return {
            "type": MessageType.REPORT,
            "step": int(step) if step is not None and step >= 0 else None,
            "total_steps": self._total,
            "samples": 0,
            "loss": report.number(_LOSS),
            "epoch": max(1, math.ceil(epoch)) if epoch is not None and epoch >= 0 else None,
        }
