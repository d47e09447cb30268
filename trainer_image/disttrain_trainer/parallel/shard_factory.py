"""trainer.optimizer.factory on the part of a cut model that a rank holds: it updates DTensors, or the parameters of some stages.

Torch's own semantics hold: an operation on a DTensor computes what it computes on the whole tensor, with collectives where it needs other
blocks. So what works element by element costs nothing, and a norm or a product of matrices is right. What no DTensor shows is tried before
the first step (`require_same`): a step that mixes parameters of several stages, draws numbers, or looks at the local blocks.
"""

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from disttrain.api.tensor_index import Layout, Place
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.factory_optimizer import FIELD, FactoryOptimizer, MakeOptimizer
from disttrain_trainer.parallel.sharded_model import Piece, ShardedModel
from disttrain_trainer.parallel.trial import tolerance

_MIXED = "mixed torch.Tensor and DTensor"
"""In what torch says of an operation on a whole tensor and a part of one."""
_STEPS = 4
_SMALL = 1 << 16
"""Elements up to which a parameter is tried, beside the smallest one of each number of dimensions."""
_MOST = 64
"""Parameters that are tried."""


class _Optimizer(FactoryOptimizer):
    """On parameters of which some are DTensors."""

    def _kept(self, value: torch.Tensor, parameter: torch.Tensor, *, what: str) -> torch.Tensor:
        if value.shape != parameter.shape or not value.dim():
            self._require_number(value, what)
            if isinstance(value, DTensor) and not all(placement.is_replicate() for placement in value.placements):
                raise WrongInput(f"{FIELD}: {what} is a sum of which each worker has a part: keep value.full_tensor()")
            return value.to_local() if isinstance(value, DTensor) else value
        if _placements(value) != _placements(parameter):
            raise WrongInput(f"{FIELD}: {what} is not cut as the parameter is: make it by torch.zeros_like(parameter)")
        return value.to_local() if isinstance(value, DTensor) else value

    def _taken(self, kept: torch.Tensor, parameter: torch.Tensor, *, in_its_shape: bool, what: str) -> torch.Tensor:
        if not in_its_shape:
            self._require_number(kept, what)
            return kept
        return _cut_as(parameter, kept.to(parameter.device))

    def _require_number(self, value: torch.Tensor, what: str) -> None:
        if value.dim():
            raise WrongInput(
                f"{FIELD}: {what} in shape {list(value.shape)}, not that of the parameter, and no block of it belongs to a block of a "
                f"parameter that is cut over the workers: train with sharding Replicated, or without {self.kind}"
            )


class ShardFactoryOptimizer:
    """See ShardOptimizer. Raises WrongInput as FactoryOptimizer."""

    def __init__(self, make: MakeOptimizer, model: ShardedModel, *, scheduled: bool = False) -> None:
        self._model = model
        self._optimizer = (
            _Optimizer(make, {piece.name: piece.parameter for piece in model.trained}, scheduled=scheduled)
            if model.trained
            else None
        )
        self.slots: dict[str, list[torch.Tensor]] = {}
        self.updates = torch.zeros(0)

    def step(self, took_part: Collection[int], *, rate: float = 1.0) -> None:
        """See ShardOptimizer. Its collectives are those of all ranks that hold blocks of the same parameters."""
        if self._optimizer is not None and took_part:
            _step(self._optimizer, [piece.number in took_part for piece in self._model.trained], rate)

    def named_state(self) -> dict[str, torch.Tensor]:
        """See FactoryOptimizer; of a DTensor the block that lies here."""
        return self._optimizer.named_state() if self._optimizer is not None else {}

    def take(self, values: dict[str, torch.Tensor], *, source: str) -> None:
        """See FactoryOptimizer; of what has the parameter's shape the block that lies here."""
        if self._optimizer is not None:
            self._optimizer.take(values, source=source)


def require_same(make: MakeOptimizer, model: ShardedModel, layout: Layout, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raises WrongInput where the optimizer computes of the parts that lie here another thing than of whole parameters.

    layout, dtypes: of the parameters of the whole model. A few steps with made-up numbers on copies of some small parameters, which every
    rank must try: those of the same blocks have collectives. Raises RuntimeError when a peer is lost meanwhile.
    """
    chosen = {place.name: place for place in _tried(layout)}
    here = [piece for piece in model.trained if piece.name in chosen]
    if not here:
        return
    device = here[0].local.device
    numbers = {name: number for number, name in enumerate(chosen)}

    def drawn(name: str, step: int) -> torch.Tensor:
        """Of other sizes in each parameter, so that a mixture of them shows."""
        generator = torch.Generator().manual_seed(1000 * step + numbers[name])
        values = torch.randn(chosen[name].shape, generator=generator, dtype=torch.float64)
        return (values * 2.0 ** (numbers[name] % 4)).to(device=device, dtype=dtypes[name])

    wholes = {name: nn.Parameter(drawn(name, 0)) for name in chosen}
    first = {name: whole.detach().clone() for name, whole in wholes.items()}
    parts = {
        piece.name: nn.Parameter(_cut_as(piece.parameter, _block(first[piece.name], piece).clone())) for piece in here
    }
    of_wholes, of_parts = FactoryOptimizer(make, wholes), _Optimizer(make, parts)
    for step in range(1, _STEPS + 1):
        for name, parameter in wholes.items():
            parameter.grad = drawn(name, step)
        for piece in here:
            parts[piece.name].grad = _cut_as(piece.parameter, _block(drawn(piece.name, step), piece).clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            of_wholes.step(())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            try:
                _step(of_parts, None, 1.0)
            except WrongInput:
                raise
            except Exception as error:
                raise WrongInput(
                    f"{FIELD}: the step of {of_parts.kind} fails on the parts of a model that is cut over the workers "
                    f"({type(error).__name__}: {str(error).splitlines()[0]:.200}): train with sharding Replicated"
                ) from error
    of_parts.named_state()  # raises where it cannot be kept
    for piece in here:
        part = parts[piece.name].detach()
        local = part.to_local() if isinstance(part, DTensor) else part
        whole, before = wholes[piece.name].detach(), first[piece.name]
        most = float((whole - before).abs().max())
        apart = float((local - _block(whole, piece)).abs().max()) if local.numel() else 0.0
        if not apart <= tolerance(torch.bfloat16) * most:  # some compute in bfloat16, whatever the parameters are
            raise WrongInput(
                f"{FIELD}: a step of {of_parts.kind} on the parts of the model is another one than on the whole: {piece.name} differs by "
                f"{apart / most if most else apart:.2g} of the change. It mixes parameters that lie on several workers, draws numbers, or "
                "works on local tensors: train with sharding Replicated"
            )


def _step(optimizer: _Optimizer, took_part: list[bool] | None, rate: float) -> None:
    try:
        optimizer.step((), took_part, rate=rate)
    except RuntimeError as error:
        if _MIXED not in str(error):
            raise
        raise WrongInput(
            f"{FIELD}: the step of {optimizer.kind} takes parameters that are cut over the workers together with whole tensors: make it "
            "with foreach=False and fused=False, and its state by torch.zeros_like(parameter)"
        ) from None


def _tried(layout: Layout) -> list[Place]:
    """Small parameters from everywhere in the model, in its order."""
    smallest: dict[int, Place] = {}
    for place in layout.places:
        known = smallest.get(len(place.shape))
        if known is None or place.stop - place.start < known.stop - known.start:
            smallest[len(place.shape)] = place
    small = [place for place in layout.places if place.stop - place.start <= _SMALL]
    names = {place.name for place in [*smallest.values(), *small[:: -(-len(small) // _MOST) or 1]]}
    return [place for place in layout.places if place.name in names]


def _block(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    sizes = zip(piece.block.offsets, piece.block.sizes, strict=True)
    return whole[tuple(slice(offset, offset + size) for offset, size in sizes)]


def _cut_as(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A tensor that is cut as the parameter is, of the block that lies here."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _placements(tensor: torch.Tensor) -> object:
    return tensor.placements if isinstance(tensor, DTensor) else None
