"""The state that a script of its own keeps beside the servers' checkpoint: JSON and tensors, in the file of a worker's buffers.

No pickle: to read a checkpoint must not run what it carries. The JSON is the tensor `session:` of bytes, in which {"$tensor": N} stands for
the tensor `session:N`.
"""

import json
import math
import threading
from pathlib import Path
from typing import Any

import torch

from disttrain.api.tensor_index import SCRIPT
from disttrain_trainer.checkpoint import tensor_file
from disttrain_trainer.errors import WrongInput

_TENSOR = "$tensor"


class StateOfScript:
    """What the script gave last. `keep` is called by its thread, `tensors` by the one that saves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tensors: dict[str, torch.Tensor] = {}

    def keep(self, state: dict[str, Any]) -> None:
        """Takes a copy. Raises WrongInput, which names the place, for what is neither a tensor nor JSON."""
        kept = _tensors_of(state)
        with self._lock:
            self._tensors = kept

    def keep_found(self, state: dict[str, Any]) -> None:
        """What an earlier process kept goes into the next checkpoint as well, unless this one has kept something."""
        kept = _tensors_of(state)
        with self._lock:
            self._tensors = self._tensors or kept

    def tensors(self) -> dict[str, torch.Tensor]:
        """The named tensors of the state; none before the first `keep`."""
        with self._lock:
            return self._tensors


def read_state(file: Path) -> dict[str, Any] | None:
    """The state in a file of a checkpoint; None where it has none. Raises WrongInput when the file is damaged."""
    found = tensor_file.read(file)
    if SCRIPT not in found:
        return None
    state = json.loads(bytes(found[SCRIPT].tolist()), object_hook=lambda value: _read(value, found))
    return state if isinstance(state, dict) else None


def _tensors_of(state: Any) -> dict[str, torch.Tensor]:
    """The state as named tensors. WrongInput as `keep`."""
    kept: dict[str, torch.Tensor] = {}
    if type(state) is not dict:
        raise WrongInput(
            f"checkpoint got a {type(state).__name__}; expected a dict of tensors, numbers, texts, lists and dicts"
        )
    text = json.dumps(_written(state, "state", kept)).encode()
    kept[SCRIPT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return kept


def _written(value: Any, place: str, kept: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or not tensor_file.can_hold(value.dtype):
            raise WrongInput(
                f"checkpoint: {place} is a tensor of {value.dtype} and {value.layout}, which a checkpoint cannot hold"
            )
        key = f"{SCRIPT}{len(kept)}"
        kept[key] = value.detach().cpu().clone()
        return {_TENSOR: key}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is list:
        return [_written(one, f"{place}[{number}]", kept) for number, one in enumerate(value)]
    if type(value) is dict and all(type(key) is str and key != _TENSOR for key in value):
        return {key: _written(one, f"{place}[{key!r}]", kept) for key, one in value.items()}
    raise WrongInput(
        f"checkpoint: {place} is a {type(value).__name__} ({value!r:.60}); expected tensors, finite numbers, texts, and lists and dicts of "
        "these with texts as keys: nothing is pickled"
    )


def _read(value: dict[str, Any], found: dict[str, torch.Tensor]) -> Any:
    return found[value[_TENSOR]] if value.keys() == {_TENSOR} else value
