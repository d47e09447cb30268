"""The user's `evaluate`: its call, also on a slice of the data set, and what it returned, as it travels to the master and the status."""

import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from disttrain.api.termination import utf8
from disttrain_trainer.checkpoint.measured import Evaluation, Measured
from disttrain_trainer.data.packed_dataset import PackedDataset
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.module import evaluating
from disttrain_trainer.model.user_code import guarded
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.termination import of_user_error

log = logs.get_logger(__name__)

LONGEST_NAME = 253
"""Characters of the name of a number of an evaluation, as in the job's status."""
MOST_BYTES_OF_NUMBERS = 512 << 10
"""Of an evaluation: a message to the master holds a mebibyte."""
_FEW = 2
"""Samples with which `evaluate` is tried: BatchNorm in training mode refuses one."""
_FEW_SECONDS, _ALL_SECONDS = 10.0, 60.0
_OF_THE_TRIAL = ("default process group", "'Subset' object")
"""In what is said of code that is right: the ranks have not met yet, and a slice lacks attributes of the data set."""
SHOWN_NUMBERS = 32
"""Numbers of an evaluation that the log has, as many as the job's status."""


class Evaluator:
    """Calls the user's `evaluate`. For the main thread."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        dataset: Callable[[], Any],
        seeds: Callable[[], AbstractContextManager[None]],
        mode: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext(),
    ) -> None:
        """name: as in the job. dataset: makes the data set of the split "test". seeds: around each call of the user's code. mode: around
        the evaluation of a model."""
        self._function = function
        self._name = name
        self._make_dataset = dataset
        self._seeds = seeds
        self._mode = mode
        self._dataset: Any = None

    def __call__(self, model: nn.Module) -> Evaluation:
        """What it finds on the whole data set. Raises WrongInput, and what the user's code raises."""
        return self.measure(model).numbers

    def measure(self, model: nn.Module, *, number: int = 0, of: int = 1) -> Measured:
        """What it finds on one of so many slices of the data set, which are neighbours of near-equal size. Each module of the model is in
        the mode of before afterwards. Without a number for a slice that has no samples; without weights for a data set that has no slices.

        Raises WrongInput, and what the user's code raises.
        """
        data = self._data()
        if of > 1:
            samples = range(len(data) * number // of, len(data) * (number + 1) // of)
            return self._measure(model, Subset(data, samples)) if samples else Measured({}, {})
        measured = self._measure(model, data)
        say(measured.numbers)
        return measured if _has_slices(data) else Measured(measured.numbers)

    def attempt(self, model: nn.Module, check: Callable[[Evaluation], None]) -> None:
        """Before the first step: calls the user's code with a copy of the model and two samples, so that a mistake costs no training.

        check: raises WrongInput for numbers that the job cannot use. What is returned for two samples may be wrong of them alone, so that
        all samples decide, where they take a minute at most. What is raised may come of them, too, or of what no training has left behind
        yet: it is logged, but for a name or module that is not there. Nothing for a data set that has no slices, or is packed, for a
        model that cannot be copied, and where two samples take ten seconds.
        """
        data = self._data()
        few = _few(data)
        if few is None:
            return
        try:
            copied = deepcopy(model)
        except Exception:
            return
        try:
            with _within(_FEW_SECONDS):
                found = self._found(copied, few)
        except _TooLong:
            return
        except Exception as error:
            if type(error) is NameError or isinstance(error, ImportError):
                raise
            if not any(text in str(error) for text in _OF_THE_TRIAL):
                where = of_user_error(error)[1].where
                log.warning(
                    "trainer.evaluate fails with %d samples before the first step (%s: %.200s; %s)",
                    len(few),
                    type(error).__name__,
                    error,
                    where,
                )
            return
        try:
            check(measured_of(found, self._name).numbers)
        except WrongInput as error:
            try:
                with _within(_ALL_SECONDS):
                    found = self._found(copied, data)
            except _TooLong:
                log.warning("with %d samples, before the first step: %s", len(few), error)
                return
            check(measured_of(found, self._name).numbers)

    def _data(self) -> Any:
        if self._dataset is None:
            with guarded("trainer.evaluate"), self._seeds():
                self._dataset = self._make_dataset()
        return self._dataset

    def _found(self, model: nn.Module, data: Any) -> Any:
        with guarded("trainer.evaluate"), self._seeds(), evaluating(model), torch.no_grad(), self._mode(model):
            return self._function(model, data)

    def _measure(self, model: nn.Module, data: Any) -> Measured:
        return measured_of(self._found(model, data), self._name)


def _has_slices(data: Any) -> bool:
    """Whether samples can be taken by their numbers: not those of an iterable data set, nor of a DataLoader."""
    return hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, Mapping)


class _TooLong(BaseException):
    """Not to be caught by the user's code."""


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises _TooLong in the main thread after so many seconds."""

    def end(number: int, frame: object) -> None:
        raise _TooLong

    handler = signal.signal(signal.SIGALRM, end)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _few(data: Any) -> Any:
    """The first samples; None where there are none."""
    if type(data) is TensorDataset:
        return TensorDataset(*(tensor[:_FEW] for tensor in data.tensors)) if len(data) else None
    if not _has_slices(data) or isinstance(data, PackedDataset) or not len(data):
        return None
    return Subset(data, range(min(_FEW, len(data))))


def measured_of(found: Any, name: str) -> Measured:
    """What the user's `evaluate`, of this name in the job, returned. Raises WrongInput."""
    try:
        pairs = {key: value for key, value in found.items() if isinstance(value, tuple | list) and len(value) == 2}
        weights = {utf8(str(key))[:LONGEST_NAME]: float(value[1]) for key, value in pairs.items()}
        numbers = numbers_of({key: pairs[key][0] if key in pairs else value for key, value in found.items()}, name)
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError):
        raise _no_numbers(found, name) from None
    if wrong := [key for key, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]:
        raise WrongInput(
            f"trainer.evaluate: {name!r} returned {wrong[0]!r} with the weight {weights[wrong[0]]}; expected a number of 0 or more, such "
            "as the number of samples"
        )
    return Measured(numbers, weights if numbers and len(weights) == len(numbers) else None)


def say(numbers: Evaluation) -> None:
    """Logs the first numbers of an evaluation."""
    shown = ", ".join(f"{key} {value:.4f}" for key, value in list(numbers.items())[:SHOWN_NUMBERS])
    more = f", and {len(numbers) - SHOWN_NUMBERS} more" if len(numbers) > SHOWN_NUMBERS else ""
    log.info("evaluation: %s%s", shown, more)


def numbers_of(found: Any, name: str | None) -> Evaluation:
    """What the user's `evaluate` returned, in the form in which it travels to the master. Raises WrongInput."""
    try:
        numbers = {utf8(str(key))[:LONGEST_NAME]: float(value) for key, value in found.items()}
    except (
        AttributeError,
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ):  # RuntimeError: a tensor of several elements
        raise _no_numbers(found, name) from None
    if (size := len(json.dumps(numbers))) > MOST_BYTES_OF_NUMBERS:
        raise WrongInput(
            f"trainer.evaluate: {name!r} returned {len(numbers)} numbers, {size >> 10} KiB as JSON; expected a few, at most "
            f"{MOST_BYTES_OF_NUMBERS >> 10} KiB: write the rest into a file"
        )
    return numbers


def _no_numbers(found: Any, name: str | None) -> WrongInput:
    return WrongInput(f"trainer.evaluate: {name!r} returned {found!r:.200}; expected a dict of names and numbers")
