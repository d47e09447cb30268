"""A rank's part of a model whose parameters are cut over a mesh: the tensors that lie here, and their places in the whole."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from disttrain.api.mesh import Coordinate
from disttrain.api.tensor_index import Block, Layout
from disttrain_trainer.checkpoint import tensors
from disttrain_trainer.errors import UserError, WrongInput
from disttrain_trainer.model.flat import norm
from disttrain_trainer.parallel import fully_shard
from disttrain_trainer.parallel.compose import LocalModel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """What lies here of one parameter."""

    name: str
    """In the whole model, as in its state_dict()."""
    number: int
    """Of a trained parameter in the whole model's layout; -1 of one that is not trained."""
    parameter: nn.Parameter
    """With FSDP2 and tensor parallelism a DTensor."""
    local: torch.Tensor
    """The elements of the block, in its shape: the parameter's own memory."""
    block: Block
    is_owner: bool
    """Of the ranks that hold these elements this one saves and counts them."""
    is_cut: bool
    """FSDP2 sums its gradient over the data-parallel ranks."""
    is_cut_by_layer: bool
    """Each rank of the tensor axis has another block of it."""


class ShardedModel:
    """The parameters and gradients of one rank, as the loop sees them (loop/trained.py), for one round."""

    def __init__(self, local: LocalModel, *, layout: Layout, at: Coordinate) -> None:
        """layout: of the whole model."""
        self.module = local.module
        self._backward_is_ours = local.pipeline is not None
        """A pipeline computes gradients where the loop asks for a loss."""
        self._roots = local.pipeline.modules if local.pipeline is not None else (local.module,)
        """What is called, which FSDP2 has wrapped."""
        self._places = layout.places
        numbers = {place.name: number for number, place in enumerate(layout.places)}
        cut = {id(record.sharded_param) for record in fully_shard.gathered(self._roots)}
        self.pieces = tuple(
            _piece(
                name,
                parameter,
                numbers=numbers,
                at=at,
                is_cut=id(parameter) in cut,
            )
            for name, parameter in local.module.named_parameters()
        )
        """Every parameter of this rank, trained or not; tied ones once."""
        self.trained = tuple(piece for piece in self.pieces if piece.number >= 0)
        self._names = {name for name, _ in local.module.named_parameters()}
        self._took: set[int] = set()
        self._discards = False
        self._watched: set[int] = set()
        self._seen_by_gradient = tuple(piece for piece in self.trained if not piece.is_cut)
        """Parameters without a hook, which took part if they have a gradient: until the first backward that counts for nothing."""

    @property
    def took_part(self) -> frozenset[int]:
        """Numbers of the parameters that have got a gradient that counts since `zero_grad`."""
        found = self._took | self._with_gradient()
        if self._backward_is_ours:
            # A schedule may add to the gradients without hooks. Of a parameter that is cut they are with the gathered one.
            numbers = {id(piece.parameter): piece.number for piece in self.trained if piece.is_cut}
            records = [r for r in fully_shard.gathered(self._roots) if r.unsharded_param.grad is not None]
            found |= {numbers[key] for r in records if (key := id(r.sharded_param)) in numbers}
        return frozenset(found)

    def zero_grad(self) -> None:
        """Before each step."""
        for piece in self.trained:
            piece.parameter.grad = None
        self._took.clear()

    def gather(self) -> None:
        """Before the first part of a step, on every rank: a pipeline's stages are made whole."""
        if self._backward_is_ours:
            fully_shard.gather(self._roots)

    def reduce(self) -> None:
        """After the last part of a step, and after `took_part`, on every rank: sums what FSDP2 sums of a pipeline's stages."""
        if self._backward_is_ours:
            fully_shard.reduce(self._roots)

    def before_backward(self, *, counts: bool) -> None:
        """Before each backward, after its forward. counts: False for one that only serves the other ranks' collectives, whose gradients
        are to be 0 here whatever they are."""
        self._discards = not counts
        if self._backward_is_ours:
            return
        if self._discards and self._seen_by_gradient:
            self._took |= self._with_gradient()
            for piece in self._seen_by_gradient:
                self._watch(piece.parameter, piece.number)
            self._seen_by_gradient = ()
        if len(self._watched) + len(self._seen_by_gradient) == len(self.trained):
            return
        by_parameter = {id(piece.parameter): piece.number for piece in self.trained if piece.is_cut}
        for record in fully_shard.gathered(self._roots):
            number = by_parameter.get(id(record.sharded_param))
            if number is not None and number not in self._watched and hasattr(record, "_unsharded_param"):
                self._watch(record.unsharded_param, number)

    def gradient(self, piece: Piece) -> torch.Tensor | None:
        """The sum that lies here, in the shape of the block; None where no rank had a gradient."""
        gradient = piece.parameter.grad
        return gradient.to_local() if isinstance(gradient, DTensor) else gradient

    def gradient_square(self) -> float:
        """The sum of the squares of the gradients that this rank owns."""
        found = [self.gradient(piece) for piece in self.trained if piece.is_owner]
        return norm([gradient for gradient in found if gradient is not None]) ** 2

    def refuse_own_backward(self) -> None:
        """See Trained."""
        if self._backward_is_ours:
            return
        for piece in self.trained:
            gradient = self.gradient(piece)
            if gradient is not None and bool(gradient.any()):
                raise UserError(
                    f"trainer.loss calls backward() itself, as it seems: parameter {piece.name} has a gradient before the loop calls it. "
                    "Leave that to the loop: return the sum of the losses, or take what the loss itself needs by torch.autograd.grad()"
                )

    def verify(self) -> None:
        """See Trained."""
        names = {name for name, _ in self.module.named_parameters()}
        if names != self._names:
            change = "added" if names - self._names else "removed"
            raise UserError(
                f"parameter {min(names ^ self._names)} was {change} after the training began; what is trained is decided once, when "
                "trainer.model returns: make all parameters there, and set those aside that rest by a flag in forward()"
            )

    def refuse_unfrozen(self) -> None:
        """See Trained."""
        for piece in self.pieces:
            if piece.number < 0 and piece.parameter.requires_grad and piece.parameter.numel():
                raise UserError(
                    f"parameter {piece.name} was frozen (requires_grad = False) when the training began, and is not now: what is trained "
                    "is decided once, when trainer.model returns: set requires_grad there"
                )

    def is_finite(self) -> bool:
        """Whether every trained element that lies here is a number."""
        return all(tensors.is_finite(piece.local.reshape(-1)) for piece in self.trained)

    def _with_gradient(self) -> set[int]:
        """Numbers of the parameters without a hook that have a gradient. Raises UserError for a sparse one."""
        found = [piece for piece in self._seen_by_gradient if piece.parameter.grad is not None]
        for piece in found:
            self._refuse_sparse(piece.parameter.grad, piece.number)
        return {piece.number for piece in found}

    def _refuse_sparse(self, gradient: torch.Tensor | None, number: int) -> None:
        if gradient is not None and gradient.layout is not torch.strided:
            raise UserError(
                f"trainer.model: the gradient of parameter {self._places[number].name} is sparse, and the workers over which the model "
                "is cut cannot sum it: leave out sparse=True in forward()"
            )

    def _watch(self, parameter: torch.Tensor, number: int) -> None:
        # Before the gradient is added to what the parts before have left.
        parameter.register_hook(self._hook(number))  # type: ignore[no-untyped-call]
        self._watched.add(number)

    def _hook(self, number: int) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def comes(gradient: torch.Tensor) -> torch.Tensor | None:
            self._refuse_sparse(gradient, number)
            if self._discards:
                return torch.zeros_like(gradient)
            self._took.add(number)
            return None

        return comes


def block_of(parameter: torch.Tensor) -> tuple[Block, frozenset[str]]:
    """The block of a parameter that lies on this rank, and the axes that it is cut along.

    The innermost axis cuts first: tensor, then shard. Each makes torch.chunk's parts.
    """
    block, cut = Block.whole(tuple(parameter.shape)), set[str]()
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis in reversed(range(mesh.ndim)):
            placement = parameter.placements[axis]
            if isinstance(placement, Shard | _StridedShard):
                block = block.cut(placement.dim, parts=mesh.size(axis), number=mesh.get_local_rank(axis))
                cut.add((mesh.mesh_dim_names or ())[axis])
    return block, frozenset(cut)


def _piece(name: str, parameter: nn.Parameter, *, numbers: dict[str, int], at: Coordinate, is_cut: bool) -> Piece:
    block, cut = block_of(parameter)
    whole = parameter.detach()
    local = whole.to_local() if isinstance(whole, DTensor) else whole
    if tuple(local.shape) != block.sizes:
        raise WrongInput(
            f"trainer.parallelize cuts parameter {name} into parts that a checkpoint does not describe: {list(local.shape)} lie here, and "
            f"{list(block.sizes)} are expected; cut it by Shard over mesh['tensor'], and after that by fully_shard over the data axes"
        )
    is_owner = at.replicate == 0 and ("shard" in cut or at.shard == 0) and ("tensor" in cut or at.tensor == 0)
    return Piece(
        name=name,
        number=numbers.get(name, -1),
        parameter=parameter,
        local=local,
        block=block,
        is_owner=is_owner and block.elements > 0,
        is_cut=is_cut,
        is_cut_by_layer="tensor" in cut,
    )
