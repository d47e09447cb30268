"""What a module's `get_extra_state` returns, as a named tensor: a tensor as it is, JSON as the bytes of its text.

A pickle of anything else would run the code that a file carries: it is refused at the start.
"""

import json
from typing import Any

import torch
from torch import nn

from disttrain.api.tensor_index import EXTRA_JSON
from disttrain_trainer.errors import WrongInput

_TENSOR = "_extra_state"
"""How state_dict() names it."""


def there_is(module: nn.Module) -> bool:
    """Whether the module has extra state, its submodules apart."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def module_of(name: str) -> str | None:
    """The prefix of the module whose extra state has this name, such as "head."; None for the name of another tensor."""
    for suffix in (EXTRA_JSON, _TENSOR):
        prefix = name.removesuffix(suffix)
        if prefix != name and (not prefix or prefix.endswith(".")):
            return prefix
    return None


def of(module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The extra state by its name in a checkpoint: a tensor as it is, JSON as a uint8 vector of its UTF-8 text. Empty when there is
    none, or `check` refuses it."""
    if not there_is(module):
        return {}
    state = module.get_extra_state()
    if isinstance(state, torch.Tensor):
        return {prefix + _TENSOR: state.detach()}
    if _no_json(state):
        return {}
    text = json.dumps(state).encode()
    return {prefix + EXTRA_JSON: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Calls `set_extra_state` with what `of` made of the state. Raises what the user's method raises."""
    module.set_extra_state(json.loads(bytes(value.tolist())) if name.endswith(EXTRA_JSON) else value)


def check(module: nn.Module, prefix: str) -> None:
    """Raises WrongInput, which names the module, for extra state that neither a checkpoint nor another worker can be given."""
    if not there_is(module):
        return
    state = module.get_extra_state()
    if not isinstance(state, torch.Tensor) and (what := _no_json(state)):
        raise WrongInput(
            f"trainer.model: the extra state of module {prefix.rstrip('.') or type(module).__name__} holds {what}, which is no JSON: a "
            "checkpoint cannot hold it, and other workers cannot be given it. Return a tensor from get_extra_state, or numbers, texts, "
            "lists and dicts of them with texts as keys"
        )


def _no_json(value: Any) -> str:
    """What is in a value that JSON does not give back as it was, such as "a tuple"; "" for nothing."""
    if value is None or type(value) in (bool, int, float, str):
        return ""
    if type(value) is list:
        return next(filter(None, map(_no_json, value)), "")
    if type(value) is dict:
        if keys := [key for key in value if type(key) is not str]:
            return f"the key {keys[0]!r}"
        return next(filter(None, map(_no_json, value.values())), "")
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeio" else f"a {name}"
