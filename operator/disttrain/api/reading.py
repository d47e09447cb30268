"""Reads what another version of DistTrain may have written: stored jobs, reports, configurations, termination messages.

Strict is who takes input from a user: the API server, `lint` and `run`. A reader takes what it understands and says what it left out.
A model validates strictly first. Only when that fails, what stands in the way is taken out, piece by piece, until the rest is valid:

| found | done |
|---|---|
| a field that this version does not know | left out, listed in `unknown` |
| a decimal string where a number is expected | converted: release 0.1.0 stored decimals as strings |
| any other value that this version does not understand | left out, so that the default holds; listed in `unreadable` |
| a required field that is missing or was left out | the object that it belongs to is left out |
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from disttrain.api.types import QUOTED_NUMBER, StoredDecimal

M = TypeVar("M", bound=BaseModel)

_ROUNDS: Final = 50
"""More than a model is deep: each round takes out at least one thing, and a parent goes one round after its child."""
_GONE: Final = object()
"""Marks what is taken out, until the round is over: the positions of a list must not move before that."""


@dataclass(frozen=True, slots=True)
class Read(Generic[M]):
    """What was read. Paths are dotted; an entry of a list goes by its type, role or name, such as conditions.Ready.status."""

    value: M
    unknown: tuple[str, ...] = ()
    """Fields that this version does not know."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Values that this version does not understand, and why; "" for an object that went with a part of it."""


class NotReadable(ValueError):
    """Not even the least of it can be read."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(self.reasons))


def sentences(unreadable: Mapping[str, str]) -> tuple[str, ...]:
    """What was not understood, one sentence each."""
    return tuple(f"{path}: {why}" if path else why for path, why in unreadable.items() if why)


def read(model: type[M], data: Any) -> Read[M]:
    """The model of some JSON value. Raises NotReadable."""
    try:
        return Read(_validated(model, data))
    except ValidationError as error:
        problem = error
    data = copy.deepcopy(data)
    unknown, unreadable = dict[str, None](), dict[str, str]()
    for _ in range(_ROUNDS):
        for details in problem.errors(include_url=False):
            _take_out(data, details, unknown, unreadable)
        data = _swept(data)
        try:
            value = _validated(model, data)
        except ValidationError as error:
            if error.errors() == problem.errors():
                break
            problem = error
        else:
            return Read(value, tuple(unknown), unreadable)
    raise NotReadable(sentences(unreadable) or (_why(problem.errors()[0], data),))


def read_json(model: type[M], text: str | bytes) -> Read[M]:
    """The same of JSON as text. Raises ValueError, also for what is no JSON."""
    return read(model, from_json(text))


def _validated(model: type[M], data: Any) -> M:
    # By its outer names alone: the API server knows no run_policy.
    return model.model_validate(data, by_alias=True, by_name=False)


def _take_out(data: Any, problem: ErrorDetails, unknown: dict[str, None], unreadable: dict[str, str]) -> None:
    """Mends one problem, or marks what it is about as gone."""
    steps = list(_walk(data, problem["loc"]))
    if not steps:
        return  # the root itself: nothing is left to take out
    parent, key = steps[-1]
    value = parent[key]
    if value is _GONE:
        return
    path = ".".join(_name(holder, step) for holder, step in steps)
    if problem["type"] == QUOTED_NUMBER:
        parent[key] = StoredDecimal(value)
        return
    if problem["type"] == "extra_forbidden":
        unknown[path] = None
    elif problem["type"] == "missing" and f"{path}.{problem['loc'][-1]}" in unreadable:
        unreadable.setdefault(path, "")
    else:
        unreadable.setdefault(path, _why(problem, value))
    parent[key] = _GONE


def _why(problem: ErrorDetails, value: Any) -> str:
    if problem["type"] == "missing":
        return f"{problem['loc'][-1]} is missing"
    shown = f" (got {value!r})" if isinstance(value, str | int | float) and len(str(value)) <= 100 else ""
    return f"{problem['msg']}{shown}"


def _walk(data: Any, location: Sequence[int | str]) -> Iterator[tuple[Any, Any]]:
    """The steps to a place as (container, key), as far as they lead: that of a missing field ends at the object that lacks it."""
    for key in location:
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and _is_index(key, data)
        if not inside:
            return
        yield data, key
        data = data[key]


def _is_index(key: int | str, items: list[Any]) -> bool:
    return isinstance(key, int) and key < len(items)


def _name(holder: Any, key: int | str) -> str:
    """How a path calls a step: a key, or what tells an entry of a list from the others."""
    entry = holder[key]
    if isinstance(holder, list) and isinstance(entry, dict):
        names = (entry.get(each) for each in ("type", "role", "name"))
        return next((name for name in names if isinstance(name, str)), str(key))
    return str(key)


def _swept(data: Any) -> Any:
    """The data without what is marked."""
    if isinstance(data, dict):
        return {key: _swept(value) for key, value in data.items() if value is not _GONE}
    if isinstance(data, list):
        return [_swept(value) for value in data if value is not _GONE]
    return data
