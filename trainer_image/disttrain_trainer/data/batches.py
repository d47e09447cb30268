"""A dataset's samples by their numbers, as one batch on the device. Not here: which numbers (slices.py)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from disttrain_trainer.errors import WrongInput

Fetch = Callable[[NDArray[np.int64]], Any]


def fetcher(dataset: Any, *, device: torch.device, field: str) -> Fetch:
    """How batches of the dataset are made: tensors are indexed at once, any other sample is got by itself and collated.

    Raises WrongInput, which begins with `field`, when the dataset has no length or no numbered samples.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise WrongInput(
            f"{field} returned a {type(dataset).__name__}; expected a map-style dataset, with __len__ and __getitem__"
        )
    if len(dataset) == 0:
        raise WrongInput(f"{field} returned an empty dataset; expected at least one sample")
    if type(dataset) is TensorDataset:
        tensors = tuple(tensor.to(device) for tensor in dataset.tensors)
        return lambda indices: [tensor[numbers] for numbers in (_tensor(indices),) for tensor in tensors]
    collated = _collater(dataset)
    if device.type == "cpu":
        return collated
    return lambda indices: _move(collated(indices), device)


def _tensor(indices: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(indices.copy())  # torch takes no read-only memory


def _collater(dataset: Dataset[Any]) -> Fetch:
    if hasattr(dataset, "__getitems__"):
        return lambda indices: default_collate(dataset.__getitems__(indices.tolist()))
    return lambda indices: default_collate([dataset[i] for i in indices.tolist()])


def _move(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_move(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_move(value, device) for value in batch)
    return batch
