"""A dataset's samples by their numbers, as one batch on the device."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from disttrain.api.termination import utf8
from disttrain_trainer.data.chance import SampleSeeds
from disttrain_trainer.data.packed_dataset import PackedDataset
from disttrain_trainer.errors import OwnGroup, UserError, WrongInput
from disttrain_trainer.runtime import machine

Load = Callable[[NDArray[np.int64], int], Any]
"""Makes a batch of samples, by their numbers, shape (samples,), and the epoch, from 1."""
Collate = Callable[[list[Any]], Any]
MOST_SAMPLES = 1 << 40
"""Of a data set: its steps and parts stay numbers that JSON and 64 bits hold exactly."""


@dataclass(frozen=True, slots=True)
class Fetcher:
    """How batches of a data set are made."""

    load: Load
    """On the CPU, where the batch is put on the device after that."""
    device: torch.device
    by_sample: bool
    """The data set's own code loads each sample: another process may do so, and it may draw."""

    def __call__(self, numbers: NDArray[np.int64], epoch: int = 1) -> Any:
        """The batch of these samples, on the device. Raises UserError when default_collate cannot make one."""
        return self.place(self.load(numbers, epoch))

    def place(self, batch: Any) -> Any:
        """A batch that `load` made, on the device. Does not wait for the copy from pinned memory."""
        device = self.device
        if device.type == "cpu":
            return batch
        return _each(batch, lambda value: _moved(value, device), "to")


def fetcher(
    dataset: Any, *, device: torch.device, field: str, collate: Collate | None = None, seed: int = 0
) -> Fetcher:
    """How batches of the dataset are made: tensors are indexed at once, any other sample is got by itself and collated.

    collate: the user's, which gets a list of samples; None: torch's default_collate. seed: of what samples draw, see chance.py.

    Raises WrongInput, which begins with `field`, when the dataset has no length or no numbered samples.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise WrongInput(
            f"{field} returned a {type(dataset).__name__}; expected a map-style dataset, with __len__ and __getitem__"
        )
    if isinstance(dataset, Mapping):
        keys = ", ".join(repr(key) for key in list(dataset)[:4])
        raise WrongInput(
            f"{field} returned a {type(dataset).__name__} with the keys {keys}; expected one map-style dataset, that of the split"
        )
    try:
        length = len(dataset)
    except (TypeError, ValueError) as error:
        raise WrongInput(f"{field} returned a dataset whose __len__ fails: {_first_line(error)}") from None
    if length == 0:
        raise WrongInput(f"{field} returned an empty dataset; expected at least one sample")
    if length > MOST_SAMPLES:
        raise WrongInput(
            f"{field} returned a dataset of {length} samples; expected at most {MOST_SAMPLES}: where it has no end, "
            "say a length such as 10**7, and set trainer.maxSteps"
        )
    if type(dataset) is TensorDataset and collate is None:
        tensors = tuple(tensor.to(device) for tensor in dataset.tensors)
        return Fetcher(
            lambda indices, _: [tensor[numbers] for numbers in (_tensor(indices),) for tensor in tensors],
            device=torch.device("cpu"),  # where they are is where they stay
            by_sample=False,
        )
    load = _collater(dataset, collate or default_collate_of(field), SampleSeeds(seed))
    if isinstance(dataset, PackedDataset) and collate is None:
        return Fetcher(_batches(dataset, otherwise=load), device, by_sample=False)
    return Fetcher(load, device, by_sample=True)


def _batches(dataset: PackedDataset, *, otherwise: Load) -> Load:
    """The rows of its blocks, which are batches already, as far as its samples are alike."""

    def load(indices: NDArray[np.int64], epoch: int) -> Any:
        batch = dataset.batch(indices)
        return otherwise(indices, epoch) if batch is None else batch

    return load


def fingerprint_of(dataset: Any) -> str | None:
    """What a data set says of its content by an attribute or a method `fingerprint`, at most 64 characters; None when it has none."""
    found = getattr(dataset, "fingerprint", None)
    if callable(found):
        found = found()
    if found is None:
        return None
    text = utf8(str(found))
    return text if len(text) <= 64 else hashlib.sha256(text.encode()).hexdigest()


def _tensor(indices: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(indices.copy())  # torch takes no read-only memory


def _collater(dataset: Dataset[Any], collate: Collate, seeds: SampleSeeds) -> Load:
    together = getattr(dataset, "__getitems__", None)

    def load_each(numbers: list[int]) -> list[Any]:
        samples = []
        for number in numbers:
            seeds.set(number)
            samples.append(dataset[number])
        return samples

    def load(indices: NDArray[np.int64], epoch: int) -> Any:
        numbers = indices.tolist()
        seeds.begin(epoch)
        if together is None:
            return guarded_batch(lambda: load_each(numbers), collate)
        seeds.set(numbers[0] if numbers else 0)
        return guarded_batch(lambda: together(numbers), collate)

    return load


def guarded_batch(samples: Callable[[], list[Any]], collate: Collate) -> Any:
    """A batch of what the user's code loads and collates. Raises what it raises."""
    field = "trainer.dataset"
    try:
        loaded = samples()
        field = "trainer.collate"
        batch = collate(loaded)
    except OwnGroup as error:
        raise error.by(field) from None
    except BaseException as error:
        machine.leave_forked_child(error)
        raise
    machine.leave_forked_child()
    return batch


def default_collate_of(field: str) -> Collate:
    """torch's default_collate, which says what is wrong in one line that begins with the field."""
    return lambda samples: _default_collate(samples, field)


def _default_collate(samples: list[Any], field: str) -> Any:
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        if len({_shape(sample) for sample in samples}) == 1:
            raise UserError(
                f"{field} gives samples of a kind that torch's default_collate cannot put into a batch, {_shape(samples[0])}: "
                f"{_first_line(error)}: give tensors, arrays, numbers, or tuples and dicts of these, or set trainer.collate"
            ) from None
        raise UserError(
            f"{field} gives samples that do not make a batch, such as {_shapes(samples)}: {_first_line(error)}: let trainer.dataset "
            "give samples of one shape, or set trainer.collate to a package.module:function(samples) -> batch that pads them"
        ) from None


def _shapes(samples: list[Any]) -> str:
    """The first sample, and the first that differs from it, by their shapes."""
    described = [_shape(sample) for sample in samples]
    return " and ".join([described[0], *[text for text in described if text != described[0]][:1]])


def _shape(sample: Any) -> str:
    if isinstance(sample, torch.Tensor | np.ndarray):
        return f"{str(sample.dtype).removeprefix('torch.')}{list(sample.shape)}"
    if isinstance(sample, Mapping):
        return "{" + ", ".join(f"{key}: {_shape(value)}" for key, value in list(sample.items())[:4]) + "}"
    if isinstance(sample, list | tuple):
        return f"{type(sample).__name__}({', '.join(_shape(part) for part in sample[:4])}{', …' if len(sample) > 4 else ''})"
    return type(sample).__name__


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value.to(device)


def pinned(batch: Any) -> Any:
    """The batch with every tensor in it in pinned memory, from which a GPU copies while the process goes on."""
    return _each(batch, methodcaller("pin_memory"), "pin_memory")


def _each(batch: Any, call: Callable[[Any], Any], method: str) -> Any:
    """The batch after this call of every tensor in it, and of what has the same method."""
    if isinstance(batch, dict):
        return {key: _each(value, call, method) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each(value, call, method) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_each(value, call, method) for value in batch)
    if callable(getattr(batch, method, None)):  # also of a library, such as a BatchEncoding, or of the user's collate
        return call(batch)
    return batch
