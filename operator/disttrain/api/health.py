"""spec.health: rules on what the training itself reports, and the rules between them and the rest of the spec.

Not here: how they are judged (plan/health.py).
"""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, StrictInt

from disttrain.api.base import Model, Rule
from disttrain.api.strategy import Consistency
from disttrain.api.types import INT32_MAX, Bound, DnsLabel, list_map


class HealthMetric(StrEnum):
    """A fact of the training, as the master reports it."""

    LOSS = "Loss"
    SAMPLES_PER_SECOND = "SamplesPerSecond"
    STEP_AGE = "StepAge"
    """Seconds since the last step."""
    GRADIENT_NORM = "GradientNorm"
    STALENESS = "Staleness"
    """Iterations by which the fastest worker is ahead of the slowest."""


class HealthAction(StrEnum):
    """What a rule does."""

    EVENT = "Event"
    RESTART_JOB = "RestartJob"
    ROLL_BACK = "RollBack"
    FAIL_JOB = "FailJob"
    SUSPEND = "Suspend"


class HealthRule(Model):
    """A bound of one metric."""

    RULES = (
        Rule(
            cel="has(self.above) != has(self.below) && (self.metric != 'StepAge' || has(self.above))",
            check=lambda rule: (
                (rule.above is None) != (rule.below is None)
                and (rule.metric is not HealthMetric.STEP_AGE or rule.above is not None)
            ),
            message="set either above or below; StepAge has above",
        ),
    )
    name: DnsLabel
    """Name of the rule."""
    metric: HealthMetric
    """Loss, SamplesPerSecond, StepAge (seconds since the last step), GradientNorm or Staleness (iterations of a worker's lead)."""
    above: Bound | None = None
    """The largest good value of the metric; set this or below."""
    below: Bound | None = None
    """The smallest good value of the metric."""
    for_seconds: Annotated[StrictInt, Field(ge=0, le=INT32_MAX)] = 60
    """Seconds in breach until the action. Default: 60."""
    action: HealthAction
    """Event, RestartJob, RollBack (to the newest checkpoint before the breach, at most three times), FailJob or Suspend."""

    @property
    def bound(self) -> str:
        """Such as "above 20". A step is too old at the bound itself."""
        if self.above is None:
            return f"below {self.below:.15g}"
        return f"{'at least' if self.metric is HealthMetric.STEP_AGE else 'above'} {self.above:.15g}"

    def broken_by(self, value: float) -> bool:
        """Whether a value of the metric is beyond the bound."""
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)


class Health(Model):
    """Rules on the training."""

    rules: Annotated[tuple[HealthRule, ...], *list_map("name", max_items=20)] = ()
    """The rules. Default: none."""

    @property
    def roll_back_seconds(self) -> int | None:
        """The longest forSeconds of a rule that rolls back; None: no rule does."""
        return max((rule.for_seconds for rule in self.rules if rule.action is HealthAction.ROLL_BACK), default=None)


def _fits(rule: HealthRule, spec: Any) -> bool:
    """Whether the job can have the rule's metric and action."""
    served, is_loop = spec.strategy.parameter_server, spec.trainer.model is not None
    if rule.action is HealthAction.ROLL_BACK and not (is_loop and spec.checkpoint is not None):
        return False
    if rule.metric is HealthMetric.STALENESS:
        return served is not None and served.consistency is not Consistency.SYNC
    return rule.metric is not HealthMetric.GRADIENT_NORM or is_loop


HEALTH_RULES = (
    Rule(
        cel="!has(self.health) || self.health.rules.all(r, "
        "(r.action != 'RollBack' || (has(self.trainer.model) && has(self.checkpoint))) && "
        "(r.metric != 'GradientNorm' || has(self.trainer.model)) && (r.metric != 'Staleness' || "
        "(has(self.strategy.parameterServer) && self.strategy.parameterServer.consistency != 'Sync')))",
        check=lambda spec: spec.health is None or all(_fits(rule, spec) for rule in spec.health.rules),
        message="RollBack needs trainer.model and checkpoint; GradientNorm needs trainer.model; Staleness needs consistency Async or "
        "BoundedStaleness",
        field="health.rules",
    ),
)
"""What must hold between the rules and the rest of the spec."""
