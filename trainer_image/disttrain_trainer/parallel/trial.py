"""Whether a model cut over the tensor axis computes what the whole one does: both compute one small batch before the first step.

Forward only, in the precision of the parameters also where trainer.precision is BFloat16, so that rounding hides nothing; with the same
chance: what is compared are the outputs of all modules that are whole in both, and the loss. So a plan that
shares out heads wrongly, or draws a dropout mask for a part of an activation, is refused with the first module whose output differs.
Gradients are compared in the first step (agreement.py).

Outputs are compared by projections (Johnson and Lindenstrauss): a few dot products tell the relative distance of two tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.objective import Loss
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.chance import Chance
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.termination import of_user_error

log = logs.get_logger(__name__)

_PROJECTIONS: Final = 8
_MOST_ELEMENTS: Final = 1 << 16
"""Of a tensor that are looked at: a wrong output is wrong nearly everywhere."""
_LOSS: Final = "trainer.loss"
_REMEDY: Final = (
    "a module between two that are cut sees its own part alone, and must count heads, say, by that; change the plan, or leave the layers "
    "around it whole"
)


def tolerance(dtype: torch.dtype) -> float:
    """The relative distance up to which two ways of one computation are the same: float64 6e-6, float32 5e-3, bfloat16 0.2.

    The cube root of the dtype's machine epsilon: above the rounding of a deep model, far below any other computation.
    """
    return float(torch.finfo(dtype).eps ** (1 / 3))


@dataclass(frozen=True, slots=True)
class Print:
    """Of a tensor: enough to tell how far another one of the same shape is from it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    norm: float
    projections: tuple[float, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Print":
        """Of a floating-point tensor of any shape."""
        flat = tensor.detach().reshape(-1)
        if flat.numel() > _MOST_ELEMENTS:
            flat = flat[:: flat.numel() // _MOST_ELEMENTS | 1]  # an odd step meets every column of a matrix
        flat = flat.double()
        places = torch.arange(flat.numel(), dtype=torch.float64, device=flat.device)
        waves = (torch.cos(places * (number + 1) ** 0.5 + number) for number in range(_PROJECTIONS))
        dots = torch.stack([torch.dot(flat, wave) for wave in waves]).tolist()
        return cls(tuple(tensor.shape), tensor.dtype, float(torch.linalg.vector_norm(flat)), tuple(dots))

    def distance(self, other: "Print") -> float:
        """About |a - b|, the Euclidean distance of the two tensors."""
        squares = [(a - b) ** 2 for a, b in zip(self.projections, other.projections, strict=True)]
        return float((2 * sum(squares) / len(squares)) ** 0.5)

    def is_near(self, other: "Print", *, dtype: torch.dtype) -> bool:
        """Whether both are the same up to the rounding of this dtype. False where one has elements that are no numbers."""
        if self.norm == other.norm and self.projections == other.projections:
            return True
        return self.distance(other) <= tolerance(dtype) * max(self.norm, other.norm)


@dataclass(slots=True)
class Outputs:
    """What the modules of a model returned in one forward, in the order in which they ended."""

    prints: dict[tuple[str, int, int], Print] = field(default_factory=dict)
    """By module, its call and the number of the tensor in what it returned."""
    drawing: set[str] = field(default_factory=set)
    """The modules that draw a mask."""
    running: list[str] = field(default_factory=list)
    """The modules that are called just now, the innermost last; where the forward raised, it was in the last one."""


class Trial:
    """Compares a model before and after it is cut. All ranks of a tensor group call it together."""

    def __init__(
        self, *, loss: Loss, batch: Callable[[], Any], seed: int, device: torch.device, chance: Chance | None = None
    ) -> None:
        """batch: returns a new batch of the same few samples. chance: of a pipeline."""
        self._loss = loss
        self._batch = batch
        self._seed = seed
        self._cuda = [device] if device.type == "cuda" else []
        self._chance = chance

    def run(self, model: nn.Module) -> Outputs | None:
        """Of the whole model; None where it cannot be called so, which the training will say."""
        try:
            return self._outputs(model, Outputs())
        except Exception as error:
            log.info("the cut model is not compared with the whole one, which raised %s", of_user_error(error)[0])
            return None

    def compare(self, before: Outputs | None, model: nn.Module, *, field: str) -> None:
        """Raises WrongInput, which begins with the field and names the module, where the cut model computes something else."""
        if before is None:
            return
        found = Outputs()
        try:
            self._outputs(model, found)
        except BrokenGroup:
            raise
        except Exception as error:
            said = of_user_error(error)[1]
            where = found.running[-1] if found.running else "trainer.loss"
            raise WrongInput(
                f"{field}: the cut model cannot be called: {said.message} in {where}: {_REMEDY}"
            ) from error
        if differs := difference(before, found):
            raise WrongInput(f"{field}: {differs}")

    def _outputs(self, model: nn.Module, outputs: Outputs) -> Outputs:
        buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        try:
            with torch.no_grad(), torch.random.fork_rng(self._cuda), _watching(model, outputs):
                torch.default_generator.manual_seed(self._seed)
                if self._cuda:
                    torch.cuda.manual_seed(self._seed)
                if self._chance is not None:
                    self._chance.begin(0, 0)
                loss = self._loss(model, self._batch())
            _note(outputs, _LOSS, 0, loss)
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the outermost one stays gathered after a forward
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        return outputs


def difference(before: Outputs, now: Outputs) -> str:
    """What differs first, in words; empty where nothing does."""
    coarsest = torch.float64
    for key, one in before.prints.items():
        other = now.prints.get(key)
        if torch.finfo(one.dtype).eps > torch.finfo(coarsest).eps:
            coarsest = one.dtype
        if other is None or other.shape != one.shape or one.is_near(other, dtype=coarsest):
            continue
        for name, call, number in before.prints:
            cut = now.prints.get((name, call, number))
            if name in before.drawing and cut is not None and cut.shape != before.prints[name, call, number].shape:
                return (
                    f"{name} draws dropout for a part of an activation, which gives another mask than one process draws: leave the layers "
                    "around it whole, or set its p to 0"
                )
        far = one.distance(other) / max(one.norm, other.norm)
        what = "trainer.loss" if key[0] == _LOSS else f"module {key[0] or 'trainer.model'}"
        return f"once the model is cut, {what} returns something else (it differs by {far:.0%}): {_REMEDY}"
    return ""


@contextmanager
def _watching(model: nn.Module, outputs: Outputs) -> Iterator[None]:
    calls: dict[str, int] = {}

    def before(name: str) -> Callable[..., None]:
        return lambda *_: outputs.running.append(name)

    def after(name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, found: Any) -> None:
            outputs.running.pop()
            call = calls[name] = calls.get(name, -1) + 1
            _note(outputs, name, call, found)

        return note

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training:
            outputs.drawing.add(name)
        handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(outputs: Outputs, name: str, call: int, found: Any) -> None:
    for number, leaf in enumerate(tree_leaves(found)):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            whole = leaf.full_tensor() if isinstance(leaf, DTensor) else leaf
            outputs.prints[name, call, number] = Print.of(whole)
