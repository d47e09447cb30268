"""Tensor parallel: the processes of the tensor axis share the Linears of a layer, by columns and then by rows.

Cut is what is certain, where the user's `trainer.parallelize` does not say it: between one or more Linears with the same input and
the Linear after them there are only elementwise functions (an MLP, gated or not), or the attention of heads (q, k, v and o). What a
module computes in between is read off its forward() with torch.fx; and attention is computed once before and once after the cut, since a
forward() may ask how wide it is. Everything else is replicated: each process computes it whole, with the same gradient.

Dropout between the Linears would draw another mask than one process draws. Such a layer stays replicated, and the log names it.
"""

import operator
import re
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.module import evaluating
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
    torch.reshape, torch.transpose, torch.permute, torch.flatten, torch.unflatten,
    "view", "reshape", "transpose", "permute", "flatten", "unflatten",
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
    left: list[str] = []
    is_cut = False
    for name, plan in plans.items():
        module = model.get_submodule(name)
        left += [_join(name, linear) for linear in plan.dropout]
        for pair in plan.pairs:
            linears = [module.get_submodule(linear) for linear in (*pair.columns, pair.row)]
            if any(id(parameter) in shared for linear in linears for parameter in linear.parameters()):
                continue
            _cut(module, pair, mesh, where=name)
            is_cut = True
    if left:
        log.info("tensor parallel: these stay whole, because of the dropout between them: %s", ", ".join(left))
    if not is_cut:
        name, why = next(
            ((name, plan.why) for name, plan in plans.items() if plan.why),
            ("", "no two Linears in it follow one another"),
        )
        if left:
            name, why = left[0], "there is dropout between it and the next Linear"
        raise WrongInput(
            f"strategy.modelParallel.tensor: no plan for {name or 'the model'} of trainer.model: {why}; write attention with Linears q, k, "
            "v and o, and others as Linear, activation, Linear, or set trainer.parallelize"
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


def _cut(module: nn.Module, pair: Pair, mesh: DeviceMesh, *, where: str) -> None:
    """Cuts the Linears of one pair. Raises WrongInput."""
    size = mesh.size()
    for name in pair.columns:
        wide = module.get_submodule(name).out_features
        if wide % size:  # type: ignore[operator]
            raise WrongInput(
                f"strategy.modelParallel.tensor: {wide} outputs of {_join(where, name)} cannot be shared by {size} processes "
                f"({wide} / {size} leaves {wide % size}): choose a tensor that divides them, or set trainer.parallelize"  # type: ignore[operator]
            )
    before = None
    heads: dict[str, int] = {}
    if pair.attention:
        heads = {
            name: value
            for name, value in vars(module).items()
            if _HEADS.fullmatch(name) and isinstance(value, int) and value > 0
        }
        for name, value in heads.items():
            if value % size:
                raise WrongInput(
                    f"strategy.modelParallel.tensor: {value} heads of {where or 'the model'} ({name}) cannot be shared by {size} processes "
                    f"({value} / {size} leaves {value % size}): choose a tensor that divides them"
                )
        before = _tried(module, pair, where)
    for name in pair.columns:
        parallelize_module(module, mesh, {name: ColwiseParallel()}, src_data_rank=None)
    parallelize_module(module, mesh, {pair.row: RowwiseParallel()}, src_data_rank=None)
    for name, value in heads.items():
        setattr(module, name, value // size)
    if before is not None:
        after = _tried(module, pair, where)
        if after.shape != before.shape or not torch.allclose(
            after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max())
        ):
            raise _no_plan(where, "it computes something else once its heads are shared out")


def _tried(module: nn.Module, pair: Pair, where: str) -> torch.Tensor:
    """What the module computes of an input that is the same each time. Raises WrongInput."""
    linear: Any = module.get_submodule(pair.columns[0])
    weight = linear.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, linear.in_features, generator=generator).to(weight.device, weight.dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(module):
            torch.default_generator.manual_seed(0)
            found = module(hidden)
    except Exception as error:
        text = str(error).splitlines()
        raise _no_plan(
            where, f"its heads cannot be shared out ({type(error).__name__}: {text[0] if text else ''})"
        ) from None
    if not isinstance(found, torch.Tensor):
        raise _no_plan(where, f"its forward() returns a {type(found).__name__}")
    return found


def _no_plan(where: str, why: str) -> WrongInput:
    return WrongInput(
        f"strategy.modelParallel.tensor: no plan for {where or 'the model'} of trainer.model: {why}; set trainer.parallelize"
    )


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
