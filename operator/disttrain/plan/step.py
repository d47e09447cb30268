"""The answer of one policy: what to do, and what to write about it. Data, no behaviour.

`decide` takes the first policy that answers; report.py makes the Plan of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from disttrain.api.reasons import ConditionType
from disttrain.plan.model import Action, Event

Truth: TypeAlias = Literal["True", "False", "Unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The new content of a condition; `conditions.merge` finds its transition time from the stored one."""

    type: ConditionType
    status: Truth
    reason: str
    """A Reason, or what an older version of the operator had stored."""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The answer of a policy."""

    actions: tuple[Action, ...] = ()
    status: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the status that change."""
    claims: tuple[Claim, ...] = ()
    """Conditions that this policy knows better than what is seen of the pods."""
    events: tuple[Event, ...] = ()
    asks: bool = False
    """The master's report of now decides."""
    final: bool = False
    """Nothing takes it back: the job fails or restarts, or a running pod is declared failed."""
    again: bool = False
    """What follows from the new status is done in a pass of its own, once it is written down."""
