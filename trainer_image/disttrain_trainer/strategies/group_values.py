"""What one rank of a group sends to the servers, and gets from them: the blocks of the parameters that it owns, packed in vectors.

A block that the ranks of a tensor axis hold alike is owned by the first of them: it alone brings the gradient and pulls the values, and the
others get them from it, so that all compute with the same, also where servers change them meanwhile (Async).
"""

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from disttrain.api.tensor_index import Layout as Places
from disttrain.api.tensor_index import Place
from disttrain_trainer.errors import UserError, WrongInput
from disttrain_trainer.model.flat import DTYPES, Layout, Vectors
from disttrain_trainer.parallel.mesh import Groups
from disttrain_trainer.parallel.sharded_model import Piece, ShardedModel
from disttrain_trainer.parameter_server.shares import Strip
from disttrain_trainer.runtime.memory import zeros


class GroupValues:
    """The values and gradients of one rank. For one thread, which calls what exchanges them on every rank of the group alike."""

    def __init__(self, model: ShardedModel, *, layout: Layout, places: Places, groups: Groups) -> None:
        """layout, places: of the whole model. Raises WrongInput for a block whose elements lie in no order of runs."""
        self._model = model
        self._places = places.places
        self._tensor = groups.mesh["tensor"]
        owned = sorted(
            (piece for piece in model.trained if piece.is_owner),
            key=lambda piece: (self._place(piece).vector, self._place(piece).start),
        )
        self.strips = tuple(_strip(piece, self._place(piece)) for piece in owned)
        """Of the whole vectors, ascending."""
        lengths = [0] * len(layout.vectors)
        self._owned: list[tuple[Piece, int, int]] = []
        """With the vector, and where its elements begin in the packed one."""
        for piece, strip in zip(owned, self.strips, strict=True):
            self._owned.append((piece, strip.vector, lengths[strip.vector]))
            lengths[strip.vector] += strip.elements
        dtypes = [DTYPES[vector.dtype] for vector in layout.vectors]
        self.parameters: Vectors = tuple(map(zeros, lengths, dtypes))
        """Packed values: what is offered first, and what a pull writes to."""
        self._gradients: Vectors = tuple(map(zeros, lengths, dtypes))
        self._shared = [piece for piece in model.trained if not piece.is_cut_by_layer and piece.block.elements]
        self._versions: list[int] = []
        self.take_out()

    def take_out(self) -> None:
        """The packed values are those of the model."""
        with torch.no_grad():
            for piece, vector, start in self._owned:
                self._view(self.parameters[vector], piece, start).copy_(piece.local)
        self._note_versions()

    def put_in(self) -> None:
        """The model takes over the packed values, and those that other ranks of the tensor axis own. Every rank must call it."""
        with torch.no_grad():
            for piece, vector, start in self._owned:
                piece.local.copy_(self._view(self.parameters[vector], piece, start))
            if self._tensor.size() > 1:
                self._share()
        self._note_versions()

    def put_in_from(self, whole: Vectors) -> None:
        """As `put_in`, from the vectors of the whole model."""
        with torch.no_grad():
            for piece, vector, start in self._owned:
                place = self._place(piece)
                values = of_place(whole[vector], place)[slices(piece)]
                self._view(self.parameters[vector], piece, start).copy_(values)
        self.put_in()

    def gradients(self, *, scale: float) -> Vectors:
        """The packed gradients x scale; 0 where there is none. Every rank must call it."""
        with torch.no_grad():
            for piece in self._model.trained:
                gradient, parameter = piece.parameter.grad, piece.parameter
                if not (isinstance(gradient, DTensor) and isinstance(parameter, DTensor)):
                    continue
                if gradient.placements != parameter.placements:  # of SequenceParallel: the sum over its own tokens
                    parameter.grad = gradient.redistribute(placements=parameter.placements)
            for piece, vector, start in self._owned:
                into = self._view(self._gradients[vector], piece, start)
                own = self._model.gradient(piece)
                if own is None:
                    into.zero_()
                else:
                    into.copy_(own)
            if scale != 1.0:
                for packed in self._gradients:
                    packed.mul_(scale)
        return self._gradients

    def shared_gradients(self) -> list[tuple[Piece, torch.Tensor | None]]:
        """Those of what the ranks of the tensor axis hold alike."""
        return [(piece, self._model.gradient(piece)) for piece in self._model.trained if not piece.is_cut_by_layer]

    def runs(self, took_part: Collection[int]) -> list[tuple[int, int, int]] | None:
        """(vector, start, stop) in the whole vectors of the parameters that took part; None where all that are owned did."""
        numbers = {piece.number for piece, _, _ in self._owned}
        if numbers <= set(took_part):
            return None
        chosen = [self._places[number] for number in sorted(numbers & set(took_part))]
        return [(place.vector, place.start, place.stop) for place in chosen]

    def refuse_changed(self) -> None:
        """Raises UserError when code of the user's has changed a trained parameter in place, which the servers would overwrite."""
        versions = [piece.local._version for piece in self._model.trained]
        for piece, before, now in zip(self._model.trained, self._versions, versions, strict=True):
            if before != now:
                raise UserError(
                    f"parameter {piece.name} was changed in place while the loss was computed (a clamp, or an embedding's max_norm): with "
                    "parameter servers these hold the parameters, and the change would be lost; leave it out, or use Hybrid with "
                    "dataParallel"
                )

    def _note_versions(self) -> None:
        self._versions = [piece.local._version for piece in self._model.trained]

    def _share(self) -> None:
        """The first rank of the tensor axis gives the others what all hold alike."""
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for piece in self._shared:
            by_dtype.setdefault(piece.local.dtype, []).append(piece.local)
        for locals_ in by_dtype.values():
            joined = torch.cat([local.reshape(-1) for local in locals_])
            dist.broadcast(joined, group=self._tensor.get_group(), group_src=0)
            if self._tensor.get_local_rank():
                for local, values in zip(
                    locals_, torch.split(joined, [local.numel() for local in locals_]), strict=True
                ):
                    local.copy_(values.view(local.shape))

    def _place(self, piece: Piece) -> Place:
        return self._places[piece.number]

    def _view(self, packed: torch.Tensor, piece: Piece, start: int) -> torch.Tensor:
        """The elements of a block, in its shape."""
        place = self._place(piece)
        if place.strides is not None:
            return packed.as_strided(place.shape, place.strides, packed.storage_offset() + start)
        return packed[start : start + piece.block.elements].view(piece.block.sizes)


def of_place(vector: torch.Tensor, place: Place) -> torch.Tensor:
    """A whole parameter in its vector, in its shape: a view."""
    if place.strides is not None:
        return vector.as_strided(place.shape, place.strides, vector.storage_offset() + place.start)
    return vector[place.start : place.stop].view(place.shape)


def slices(piece: Piece) -> tuple[slice, ...]:
    """Where the block lies in the whole parameter."""
    block = piece.block
    return tuple(slice(offset, offset + size) for offset, size in zip(block.offsets, block.sizes, strict=True))


def _strip(piece: Piece, place: Place) -> Strip:
    """Where the elements of a block lie in the vector of the whole model."""
    whole = piece.block.sizes == piece.block.shape
    if place.strides is not None and not whole:
        raise WrongInput(
            f"trainer.model: parameter {piece.name} is cut over the tensor axis and is not contiguous, which parameter servers do not "
            "take; make it contiguous"
        )
    if whole:
        return Strip(place.vector, place.start, place.stop - place.start)
    try:
        runs = piece.block.piece("", "")
    except ValueError as error:
        raise WrongInput(f"trainer.parallelize: parameter {piece.name}: {error}; cut it along one dimension") from None
    return Strip(place.vector, place.start + runs.start, runs.length, runs.count, runs.stride if runs.count > 1 else 0)
