"""trainer.optimizer.factory: a torch.optim.Optimizer of the user's own on the trained parameters, and its state by their names.

A learning rate of its param_groups is the one that it was made with, times the factor of the schedule. A parameter without a gradient in a
step has `grad` None in it, as in a plain loop.

state:<slot>.<name>    a tensor of a parameter's state in the parameter's shape, such as state:exp_avg.layers.0.weight
number:<slot>.<name>   one of another shape, such as a count of steps
number:json.<name>     what is no tensor: numbers of the state, and values of the param_group that the optimizer has changed itself
"""

import json
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from disttrain.api.tensor_index import OWN_NUMBER, OWN_STATE
from disttrain_trainer.errors import WrongInput

FIELD = "trainer.optimizer.factory"
_JSON = "json"
_NOT_KEPT = frozenset({"params", "param_names", "lr", "initial_lr"})
"""Keys of a param group that are the model's, or the schedule's."""

MakeOptimizer = Callable[[list[nn.Parameter]], Any]


class FactoryOptimizer:
    """For the training thread. Raises WrongInput for what is no optimizer of the model's trained parameters."""

    def __init__(self, make: MakeOptimizer, parameters: Mapping[str, nn.Parameter], *, scheduled: bool = False) -> None:
        """parameters: those that are trained, by name. scheduled: the job has a learningRateSchedule. Raises WrongInput, too, where that
        would be without effect."""
        self._parameters = dict(parameters)
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        optimizer = make(list(parameters.values()))
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise WrongInput(f"{FIELD} returned a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
        self.kind = type(optimizer).__name__
        if _needs_closure(optimizer):
            raise WrongInput(
                f"{FIELD}: the step of {self.kind} calls the loss itself, by a closure, which a step over all workers cannot be: take an "
                "optimizer whose step needs none"
            )
        self._groups: dict[str, int] = {}
        """Which param_group each parameter is in, by name."""
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if (name := self._names.get(id(parameter))) is None:
                    raise WrongInput(
                        f"{FIELD}: the optimizer has a tensor of shape {list(parameter.shape)} that is no trained parameter of the model: "
                        "give it those that the function is called with"
                    )
                self._groups[name] = number
        self._optimizer = optimizer
        rates = [group.get("lr") for group in optimizer.param_groups]
        if scheduled and not all(isinstance(rate, int | float | torch.Tensor) for rate in rates):
            raise WrongInput(
                f"trainer.learningRateSchedule: the {self.kind} of {FIELD} has no number `lr` in its param_groups, which the schedule "
                "could multiply: leave the schedule out"
            )
        self._rates = [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]
        self._made_with = [_values_of(group) for group in optimizer.param_groups]

    def step(
        self, gradients: Sequence[torch.Tensor], took_part: list[bool] | None = None, *, rate: float = 1.0
    ) -> None:
        """See FlatOptimizer. gradients: those of the parameters are views of them."""
        for group, base in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(base, int | float | torch.Tensor):
                group["lr"] = base * rate
        parameters = [*self._parameters.values()]
        kept = [parameter.grad for parameter in parameters]
        if took_part is not None:
            for parameter, took in zip(parameters, took_part, strict=True):
                if not took:
                    parameter.grad = None
        try:
            self._optimizer.step()
        finally:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient

    def state(self) -> dict[str, list[torch.Tensor]]:
        """See FlatOptimizer: nothing of it lies in the vectors of the model."""
        return {}

    def restore(self, updates: Sequence[torch.Tensor]) -> None:
        """See FlatOptimizer."""

    def named_state(self) -> dict[str, torch.Tensor]:
        """The state by names, as in the module's docstring; nothing before the first step. The tensors are those in use. Raises WrongInput
        for a state that is neither tensor nor JSON."""
        found, plain = {}, dict[str, dict[str, Any]]()
        for parameter, state in self._optimizer.state.items():
            name = self._names[id(parameter)]
            for slot, value in state.items():
                if "." in slot or slot == _JSON:
                    raise WrongInput(
                        f"{FIELD}: the state of {self.kind} is called {slot!r}, which a checkpoint cannot: rename it"
                    )
                if isinstance(value, torch.Tensor):
                    kind = OWN_STATE if value.shape == parameter.shape else OWN_NUMBER
                    found[f"{kind}{slot}.{name}"] = self._kept(
                        value, parameter, what=f"the state {slot!r} of parameter {name}"
                    )
                elif _is_plain(value):
                    plain.setdefault(name, {})[slot] = value
                else:
                    raise WrongInput(
                        f"{FIELD}: the state {slot!r} of parameter {name} is a {type(value).__name__}, which a checkpoint cannot hold: "
                        "only tensors, numbers, texts and None can be saved"
                    )
        changed = [
            {key: value for key, value in _values_of(group).items() if value != made.get(key)}
            for group, made in zip(self._optimizer.param_groups, self._made_with, strict=True)
        ]
        for name, number in self._groups.items():
            if name in plain or changed[number]:
                text = json.dumps({"state": plain.get(name, {}), "group": changed[number]}).encode()
                found[f"{OWN_NUMBER}{_JSON}.{name}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return found

    def take(self, values: Mapping[str, torch.Tensor], *, source: str) -> None:
        """Takes over what `named_state` of another process returned, copied; of nothing, the state before the first step.

        Raises WrongInput when it is of another optimizer."""
        states: dict[str, dict[str, Any]] = {}
        changed: dict[int, dict[str, Any]] = {}
        for key, value in values.items():
            slot, _, name = key.partition(".")
            kind, _, slot = slot.partition(":")
            if name not in self._groups:
                raise WrongInput(f"{FIELD}: {source} is of another optimizer: it has state of {name}")
            state, parameter = states.setdefault(name, {}), self._parameters[name]
            if slot == _JSON:
                described = json.loads(bytes(value.tolist()))
                state.update(described["state"])
                changed.setdefault(self._groups[name], {}).update(described["group"])
            else:
                what = f"{source} has the state {slot!r} of parameter {name}"
                state[slot] = self._taken(
                    value.detach().clone(), parameter, in_its_shape=f"{kind}:" == OWN_STATE, what=what
                )
        self._optimizer.state.clear()
        for name, state in states.items():
            self._optimizer.state[self._parameters[name]] = state
        for number, (group, made) in enumerate(zip(self._optimizer.param_groups, self._made_with, strict=True)):
            group.update(made)
            for key, value in changed.get(number, {}).items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value

    def _kept(self, value: torch.Tensor, parameter: torch.Tensor, *, what: str) -> torch.Tensor:
        """What this process keeps of a tensor of the state. what: it is called so in messages."""
        return value

    def _taken(self, kept: torch.Tensor, parameter: torch.Tensor, *, in_its_shape: bool, what: str) -> torch.Tensor:
        """The tensor of the state of which `_kept` was kept. in_its_shape: in that of the parameter."""
        return kept.to(parameter.device) if kept.dim() else kept


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """As that of torch.optim.LBFGS."""
    closure = signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def _values_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a param group a checkpoint can hold, beside its parameters and its learning rate."""
    return {key: value for key, value in group.items() if key not in _NOT_KEPT and _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
