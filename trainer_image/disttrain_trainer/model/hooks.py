"""The user's hooks: one object of `trainer.hooks` in each worker process, whose methods are called at three moments of the training.

    class Hooks:
        def __init__(self, config): ...                    # or without config
        def on_start(self, task): ...                      # before the first step of this process
        def on_step(self, step, loss, metrics): ...        # after each step
        def on_evaluate(self, metrics) -> bool | None: ... # after each evaluation; True ends the training

Each method may be left out. What a hook raises is the user's error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint.measured import Evaluation
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.factories import check_signature, resolve
from disttrain_trainer.model.user_code import guarded

_METHODS = {"on_start": ("task",), "on_step": ("step", "loss", "metrics"), "on_evaluate": ("metrics",)}
_FIELD = "trainer.hooks"
STOP = "trainer.hooks: on_evaluate asked for the end"
"""Why a training ends that a hook has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookTask:
    """What on_start gets."""

    model: nn.Module
    """As trainer.model returned it, on the device of this process; where the model is cut over the workers: before it is cut."""
    config: dict[str, Any]
    """trainer.config."""
    rank: int
    """Of this process, from 0."""
    world_size: int
    total_steps: int


class Hooks:
    """The hooks of one process. For its main thread."""

    def __init__(self, found: Any) -> None:
        self._on_start: Callable[[HookTask], object] | None = getattr(found, "on_start", None)
        self.on_step: Callable[[int, float | None, dict[str, float]], object] | None = getattr(found, "on_step", None)
        """Called with the steps that are done, the mean loss of what this process computed of the last one (None: it had no part), and
        what else is known of it."""
        self._on_evaluate: Callable[[Evaluation], object] | None = getattr(found, "on_evaluate", None)

    @classmethod
    def of(cls, config: JobConfig) -> "Hooks | None":
        """Those that the job names. Raises WrongInput, and what the user's code raises."""
        name = config.trainer.hooks
        if name is None:
            return None
        with guarded(_FIELD):
            made = resolve(_FIELD, name)
            options = dict(config.trainer.config or {})
            place = f"{_FIELD}: {name!r}", name.partition(":")[2]
            try:
                check_signature(made, ("config",), *place)
                arguments: tuple[Any, ...] = (options,)
            except WrongInput as error:
                try:
                    check_signature(made, (), *place)
                except WrongInput:
                    raise error from None
                arguments = ()
            found = made(*arguments)
        methods = {method: getattr(found, method) for method in _METHODS if hasattr(found, method)}
        if not methods:
            raise WrongInput(f"{_FIELD}: {name!r} has none of the methods {', '.join(_METHODS)}")
        for method, function in methods.items():
            if not callable(function):
                raise WrongInput(f"{_FIELD}: {name!r}: {method} is a {type(function).__name__}; expected a method")
            check_signature(function, _METHODS[method], f"{_FIELD}: {name!r}", method)
        return cls(found)

    def start(self, task: HookTask) -> None:
        """Before the first step of this process."""
        if self._on_start is not None:
            with guarded(_FIELD):
                self._on_start(task)

    def evaluated(self, numbers: Evaluation) -> bool:
        """After an evaluation; whether the training is to end."""
        if self._on_evaluate is None:
            return False
        with guarded(_FIELD):
            return bool(self._on_evaluate(dict(numbers)))
