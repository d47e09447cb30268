"""Tensor parallel: the processes of the tensor axis share the Linears of a layer, by columns and then by rows.

Cut is what is certain, where the user's `trainer.parallelize` does not say it: between one or more Linears with the same input and
the Linear after them there are only elementwise functions (an MLP, gated or not), or the attention of heads (q, k, v and o). What a
module computes in between is read off its forward() with torch.fx; and attention is computed once before and once after the cut, since a
forward() may ask how wide it is. A Linear of one output that scales the others (a gate) stays whole, and its gradient is summed. Everything
else is replicated: each process computes it whole, with the same gradient.

Dropout between the Linears would draw another mask than one process draws. Such a layer stays replicated, and so does one whose widths or
heads cannot be divided; the log names both.
"""

import operator
import re
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_leaves

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.module import evaluating
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.trial import Print
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

_HEADS: Final = re.compile(r"(n_?|num_)?(kv_|key_value_|attention_|attn_)?heads?|n_?kv")
"""The names under which an attention keeps how many heads it has."""
_ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.LogSigmoid,
    nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity,
)  # fmt: skip
_ELEMENTWISE = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.tanh, F.sigmoid, F.logsigmoid, F.softplus,
    F.softsign, F.hardswish, F.hardsigmoid, torch.relu, torch.tanh, torch.sigmoid, torch.square,
    torch.mul, torch.add, torch.sub, torch.div, operator.mul, operator.add, operator.sub, operator.truediv, operator.pow, operator.neg,
    "relu", "tanh", "sigmoid", "square", "mul", "add", "sub", "div", "pow", "neg", "contiguous", "float", "to", "type_as",
}  # fmt: skip
_SHAPING = {
    torch.reshape, torch.transpose, torch.permute, torch.flatten, torch.unflatten, torch.unsqueeze, torch.repeat_interleave,
    "view", "reshape", "transpose", "permute", "flatten", "unflatten", "unsqueeze", "repeat_interleave", "expand",
}  # fmt: skip
_PRODUCTS = {torch.matmul, operator.matmul, "matmul"}
_SOFTMAX = {F.softmax, torch.softmax, "softmax"}
_MASKS = {torch.masked_fill, "masked_fill"}


@dataclass(frozen=True, slots=True)
class Pair:
    """Linears that are cut by columns, and the one after them that is cut by rows; names in the module whose forward() was read."""

    columns: tuple[str, ...]
    row: str
    attention: bool


@dataclass(slots=True)
class Plan:
    """What of a module can be cut, and why the rest cannot."""

    pairs: list[Pair] = field(default_factory=list)
    dropout: list[str] = field(default_factory=list)
    """The Linears of pairs that stay replicated, since there is dropout in between."""
    why: str = ""


def apply(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model with its layers shared among the processes of `mesh`, which has one dimension; the same modules, in place.

    All processes of the mesh call it with the same values in the parameters. Raises WrongInput.
    """
    plans = {name: plan_of(module) for name, module in model.named_modules() if _has_linears(module)}
    shared = _shared(model)
    left: dict[str, str] = {}
    is_cut = False
    for name, plan in plans.items():
        module = model.get_submodule(name)
        left |= {_join(name, linear): "there is dropout between it and the next Linear" for linear in plan.dropout}
        for pair in plan.pairs:
            linears = [module.get_submodule(linear) for linear in (*pair.columns, pair.row)]
            if any(id(parameter) in shared for linear in linears for parameter in linear.parameters()):
                continue
            if why := _indivisible(module, pair, mesh.size()) or (pair.attention and _changes(module, pair, mesh)):
                parts = [""] if pair.attention else [*pair.columns, pair.row]
                left |= {_join(name, part) if part else name or "the model": why for part in parts}
                continue
            _cut(module, pair, mesh)
            is_cut = True
    if not is_cut:
        name, why = next(
            iter(left.items()),
            next(
                ((name, plan.why) for name, plan in plans.items() if plan.why),
                ("", "no two Linears in it follow one another"),
            ),
        )
        raise WrongInput(
            f"strategy.modelParallel.tensor: no plan for {name or 'the model'} of trainer.model: {why}; write attention with Linears q, k, "
            "v and o, and others as Linear, activation, Linear, or set trainer.parallelize"
        )
    for why in dict.fromkeys(left.values()):
        log.info(
            "tensor parallel: these stay whole: %s: %s", ", ".join(name for name in left if left[name] == why), why
        )
    return model


def plan_of(module: nn.Module) -> Plan:
    """The pairs of Linears among a module's own members, or those of its members' members that it calls by name."""
    graph = _Calls()
    try:
        nodes = graph.trace(module)
    except Exception as error:  # a forward that depends on values: anything may come of it
        return Plan(
            why=f"its forward() cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
    plan = Plan()
    members = dict(module.named_modules())
    used: set[str] = set()
    for node in nodes.nodes:
        if not _is_linear(node, members):
            continue
        region = _Region(node, members)
        linears = {*region.columns, str(node.target)}
        if region.why or not region.columns or used & linears:
            plan.why = plan.why or region.why
        elif region.drops:
            plan.dropout += [*region.columns, str(node.target)]
        else:
            plan.pairs.append(Pair(tuple(region.columns), str(node.target), region.attention))
            used |= linears
    return plan


class _Calls(fx.Tracer):
    """Reads a forward() whose members are called and not looked into."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


class _Region:
    """What is between a Linear and those before it."""

    def __init__(self, row: fx.Node, members: dict[str, nn.Module]) -> None:
        self.columns: list[str] = []
        self.drops = False
        """Whether there is dropout."""
        self.why = ""
        """Why it cannot be cut, where it looks as if it could."""
        self._members = members
        self._nodes = {row}
        self._inputs: set[Any] = set()
        self._whole = self._shapes = self._attends = False
        """Whether it takes in what is not of those Linears; puts anything into another shape; calls torch's attention."""
        self._products = self._softmaxes = 0
        self._walk(row.args[0])
        self.attention = self._attends or (self._products == 2 and self._softmaxes == 1)
        if self._whole or not self.columns:
            self.columns = []
        elif not self.why:
            self.why = self._doubt(row)

    def _walk(self, node: Any) -> None:
        """node: an argument; from there back to the Linears."""
        if node in self._nodes or not isinstance(node, fx.Node):
            return
        self._nodes.add(node)
        target: Any = node.target
        member = self._members.get(target) if node.op == "call_module" else None
        if type(member) is nn.Linear:
            self.columns.append(target)
            self._inputs.add(node.args[0])
        elif node.op in ("placeholder", "get_attr"):
            self._whole = True
        elif isinstance(member, _ELEMENTWISE_MODULES):
            self._walk(node.args[0])
        elif isinstance(member, nn.modules.dropout._DropoutNd):
            self.drops = self.drops or member.p > 0
            self._walk(node.args[0])
        elif isinstance(member, nn.Softmax) or target in _SOFTMAX:
            self._softmaxes += 1
            self._walk(node.args[0])
        elif member is not None:
            self.why = f"it is not known what {target} does between its Linears"
        elif target is F.scaled_dot_product_attention:
            self._attends = True
            dropped: Any = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
            self.drops = self.drops or dropped != 0
            for argument in (*node.args[:3], *(node.kwargs.get(name) for name in ("query", "key", "value"))):
                self._walk(argument)
        elif target in (F.dropout, torch.dropout):
            self.drops = True
            self._walk(node.args[0])
        elif target in _PRODUCTS:
            self._products += 1
            for argument in node.args[:2]:
                self._walk(argument)
        elif target in _SHAPING or target in _MASKS:
            self._shapes = True
            self._walk(node.args[0])
        elif target in _ELEMENTWISE:
            for argument in node.args:
                self._walk(argument)
        else:
            self.why = f"it is not known what {getattr(target, '__name__', target)}() does between its Linears"

    def _doubt(self, row: fx.Node) -> str:
        if not self.attention and (self._shapes or self._products or self._softmaxes):
            return f"what is between {self.columns[0]} and {row.target} is neither elementwise nor attention"
        if not self.attention and len(self._inputs) > 1:
            return f"{' and '.join(self.columns)} have another input each"
        if any(user not in self._nodes for node in self._nodes - {row} for user in node.users):
            return f"what {self.columns[0]} gives is used beside {row.target}, too"
        return ""


def _indivisible(module: nn.Module, pair: Pair, size: int) -> str:
    """Why the widths or heads of a pair cannot be divided by `size` processes; empty where they can."""
    for name in pair.columns:
        wide = int(module.get_submodule(name).out_features)  # type: ignore[arg-type]
        if wide % size and not _is_gate(module, name, pair):
            return (
                f"{wide} outputs of {name} cannot be shared by {size} processes ({wide} / {size} leaves {wide % size}): choose a tensor "
                "that divides them"
            )
    for name, value in _heads(module).items() if pair.attention else ():
        if value % size:
            return (
                f"{value} heads ({name}) cannot be shared by {size} processes ({value} / {size} leaves {value % size}): choose a tensor "
                "that divides them"
            )
    return ""


def _is_gate(module: nn.Module, name: str, pair: Pair) -> bool:
    """Whether a Linear has one output, which scales all those of the others: it stays whole."""
    wide = [int(module.get_submodule(column).out_features) for column in (name, *pair.columns)]  # type: ignore[arg-type]
    return not pair.attention and wide[0] == 1 and max(wide) > 1


def _heads(module: nn.Module) -> dict[str, int]:
    """The attributes that count heads."""
    return {
        name: value
        for name, value in vars(module).items()
        if _HEADS.fullmatch(name) and isinstance(value, int) and value > 0
    }


def _cut(module: nn.Module, pair: Pair, mesh: DeviceMesh) -> None:
    """Cuts the Linears of one pair."""
    for name in pair.columns:
        if _is_gate(module, name, pair):
            module.get_submodule(name).register_forward_hook(partial(_scales_parts, mesh))
        else:
            parallelize_module(module, mesh, {name: ColwiseParallel()}, src_data_rank=None)
    parallelize_module(module, mesh, {pair.row: RowwiseParallel()}, src_data_rank=None)
    for name, value in _heads(module).items() if pair.attention else ():
        setattr(module, name, value // mesh.size())


def _scales_parts(mesh: DeviceMesh, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    """The same output, whose gradient is the sum over the processes: each knows that by its own columns."""
    whole = DTensor.from_local(output, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def _changes(module: nn.Module, pair: Pair, mesh: DeviceMesh) -> str:
    """Why an attention cannot be cut, as a copy of it shows; empty where it can."""
    try:
        before = _tried(module, pair)
        copy = deepcopy(module)
        _cut(copy, pair, mesh)
        after = _tried(copy, pair)
    except BrokenGroup:
        raise
    except Exception as error:
        text = str(error).splitlines()
        return f"its heads cannot be shared out ({type(error).__name__}: {text[0] if text else ''})"
    if before is None or after is None:
        return "its forward() returns no tensor"
    if after.shape == before.shape and Print.of(after).is_near(Print.of(before), dtype=before.dtype):
        return ""
    return "it computes something else once its heads are shared out"


def _tried(module: nn.Module, pair: Pair) -> torch.Tensor | None:
    """What the module computes of an input that is the same each time: the first tensor that it returns. Raises what it raises."""
    linear: Any = module.get_submodule(pair.columns[0])
    weight = linear.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, linear.in_features, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(module):
        torch.default_generator.manual_seed(0)
        found = module(hidden)
    return next((leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)), None)


def _has_linears(module: nn.Module) -> bool:
    """Whether two or more of its direct members are Linears."""
    return sum(isinstance(member, nn.Linear) for member in module.children()) > 1


def _is_linear(node: fx.Node, members: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and type(members.get(str(node.target))) is nn.Linear


def _shared(model: nn.Module) -> set[int]:
    """The parameters that have several names."""
    seen: set[int] = set()
    found: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (found if id(parameter) in seen else seen).add(id(parameter))
    return found


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
