"""The micro-batches of a part: a batch cut by samples."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from disttrain_trainer.errors import UserError


def slices(samples: int, size: int) -> list[slice]:
    """The samples in pieces of `size`, the last one smaller. A single sample, with which BatchNorm cannot train, joins the one before."""
    starts = list(range(0, samples, size))
    if len(starts) > 1 and size > 1 and samples - starts[-1] == 1:
        starts.pop()
    return [slice(start, stop) for start, stop in pairwise([*starts, samples])]


def cut(value: Any, samples: int, piece: slice) -> Any:
    """A piece of a batch: of each tensor and array whose first dimension is the samples, and of lists of one value a sample.

    Raises UserError for what it does not know.
    """
    match value:
        case torch.Tensor() | np.ndarray():
            return value[piece] if value.ndim and value.shape[0] == samples else value
        case dict():
            return {name: cut(one, samples, piece) for name, one in value.items()}
        case list() | tuple():
            if len(value) == samples and not any(
                isinstance(one, torch.Tensor | np.ndarray | list | tuple | dict) for one in value
            ):
                return value[piece]
            found = [cut(one, samples, piece) for one in value]
            return (
                found if isinstance(value, list) else type(value)(*found) if hasattr(value, "_fields") else tuple(found)
            )
        case None | bool() | int() | float() | str() | bytes():
            return value
    raise UserError(
        f"trainer.collate: a batch with a {type(value).__name__} cannot be cut into the micro-batches of a pipeline: use tensors, lists, "
        "tuples and dicts"
    )


def shape(value: Any) -> Any:
    """What the shapes of a micro-batch's tensors are, to be compared."""
    match value:
        case torch.Tensor() | np.ndarray():
            return (tuple(value.shape), str(value.dtype))
        case dict():
            return tuple((name, shape(one)) for name, one in value.items())
        case list() | tuple():
            return tuple(shape(one) for one in value)
    return None
