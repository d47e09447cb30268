"""A checkpoint read by the names of its tensors, whichever strategy wrote it: the pieces that the manifest lists, put together.

So a training goes on with another number of servers, or by another strategy. Elements are counted in the order in which they lie in
the flat vectors of the trained parameters.
"""

import json
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from disttrain.api.tensor_index import (
    EXTRA_JSON,
    LAYOUT,
    OWN_NUMBER,
    OWN_STATE,
    PART,
    UPDATES,
    Block,
    Entry,
    Layout,
    Place,
    Stored,
    read_header,
)
from disttrain_trainer.checkpoint import composite, extra_state, resuming, tensor_file, tensors
from disttrain_trainer.checkpoint.manifest import NAME, Manifest
from disttrain_trainer.checkpoint.tensor_file import Source
from disttrain_trainer.errors import WrongInput

PIECE = 1 << 20
"""Elements that are read at a time of a tensor that is written elsewhere."""
PARAMETERS = "parameters"
"""How a tensor itself is called among its slots."""


class NamedCheckpoint:
    """The tensors of one checkpoint. A context: it holds the files open. Raises WrongInput, which names the file, for what is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = Manifest.read((folder / NAME).read_text())
            headers = {
                file: read_header(folder / file) for file in self.manifest.files if file.endswith(".safetensors")
            }
        except (OSError, ValueError) as error:
            raise WrongInput(f"checkpoint {folder} cannot be read: {error}") from None
        layouts = [header.metadata[LAYOUT] for header in headers.values() if LAYOUT in header.metadata]
        if not layouts:
            raise WrongInput(f"checkpoint {folder} does not say how its model lies in its files")
        self.layout = Layout.model_validate_json(layouts[0])
        self._files: dict[str, Any] = {}
        self._shards = sorted(
            (json.loads(header.metadata["server"])[0], header)
            for header in headers.values()
            if "server" in header.metadata
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, trace)

    def places(self, vector: int) -> list[Place]:
        """The parameters of a vector, in their order in it."""
        return [place for place in self.layout.places if place.vector == vector]

    def require_whole_steps(self) -> None:
        """Raises WrongInput when the checkpoint was written in the middle of a step: its parts belong to one cut of the model."""
        manifest = self.manifest
        whole = [[0, manifest.parts]] if manifest.parts else []
        applied = [json.loads(header.metadata["applied"]) for _, header in self._shards]
        if manifest.parts != manifest.step * manifest.parts_per_step or any(parts != whole for parts in applied):
            raise WrongInput(
                f"checkpoint {self.folder.name} was written in the middle of a step: only the same strategy with as many servers can go "
                "on from it. Go on so, and suspend the job: that writes one between two steps"
            )

    def entry(self, name: str) -> Entry:
        """Dtype, shape, pieces and slots of a tensor of state_dict(). Raises WrongInput when there is none of this name."""
        if (found := self.manifest.tensors.get(name)) is None:
            raise WrongInput(
                f"checkpoint {self.folder}: its manifest has no tensor {name}: it is of another model; make trainer.model that one, "
                "or begin with an empty checkpoint volume"
            )
        return found

    def elements(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        """The elements [start, stop) of a tensor or slot: one-dimensional, of the dtype in the file, on the CPU. Reads only these bytes.

        Raises WrongInput when the files hold fewer.
        """
        if any(piece.count > 1 for piece in stored.pieces):
            return self._of_rows(stored, start, stop)
        parts = []
        for piece in sorted(stored.pieces, key=lambda piece: piece.start):
            low, high = max(start, piece.start), min(stop, piece.start + piece.length)
            if low < high:
                at = piece.offset - piece.start
                parts.append(self._range(piece.file, piece.key, at + low, at + high))
        found = torch.cat(parts) if parts else torch.empty(0)
        self._require_all(len(found), stop - start)
        return found

    def block(self, stored: Stored, block: Block) -> torch.Tensor:
        """A block of a tensor or slot: in the block's shape, of the dtype in the file, on the CPU. Reads little more than its bytes."""
        if not block.elements:
            return torch.empty(block.sizes)
        if stored.strides is not None or not block.shape:
            flat = self.elements(stored, 0, prod(block.shape))
            whole = flat.view(block.shape) if stored.strides is None else flat.as_strided(block.shape, stored.strides)
            return whole[tuple(slice(o, o + s) for o, s in zip(block.offsets, block.sizes, strict=True))].contiguous()
        row = prod(block.shape[1:])
        first, rows = block.offsets[0], block.sizes[0]
        found = self.elements(stored, first * row, (first + rows) * row).view(rows, *block.shape[1:])
        inner = zip(block.offsets[1:], block.sizes[1:], strict=True)
        return found[(slice(None), *(slice(o, o + s) for o, s in inner))].contiguous()

    def _of_rows(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        """`elements` of pieces with several runs."""
        found: torch.Tensor | None = None
        filled = 0
        for piece in stored.pieces:
            last = piece.start + (piece.count - 1) * piece.stride + piece.length
            if last <= start or piece.start >= stop:
                continue
            values = self._range(piece.file, piece.key, piece.offset, piece.offset + piece.count * piece.length)
            found = torch.empty(stop - start, dtype=values.dtype) if found is None else found
            first = max(0, (start - piece.start - piece.length) // piece.stride)
            for number in range(first, min(piece.count, -((piece.start - stop) // piece.stride))):
                at = piece.start + number * piece.stride
                low, high = max(start, at), min(stop, at + piece.length)
                if low < high:
                    begin = number * piece.length + low - at
                    found[low - start : high - start] = values[begin : begin + high - low]
                    filled += high - low
        self._require_all(filled, stop - start)
        return torch.empty(0) if found is None else found

    def _require_all(self, found: int, wanted: int) -> None:
        if found != wanted:
            raise WrongInput(f"checkpoint {self.folder} is damaged: {found} of {wanted} elements are there")

    def in_memory_order(self, place: Place) -> torch.Tensor:
        """All elements of a trained parameter, one-dimensional, in the order in which they lie in its vector."""
        return self._in_memory_order(place, self.entry(place.name))

    def _in_memory_order(self, place: Place, stored: Stored) -> torch.Tensor:
        flat = self.elements(stored, 0, place.stop - place.start)
        if place.strides is None or stored.strides is not None:
            return flat
        memory = torch.empty_like(flat)
        memory.as_strided(place.shape, place.strides).copy_(flat.view(place.shape))
        return memory

    def vector(self, number: int, slot: str, start: int, stop: int) -> torch.Tensor | None:
        """The elements [start, stop) of a flat vector of parameters, or of a slot of it such as Adam's `mean`: one-dimensional, on the CPU.

        None where the checkpoint has no such slot.
        """
        parts = []
        for place in self.places(number):
            low, high = max(start, place.start), min(stop, place.stop)
            if low >= high:
                continue
            if slot == PARAMETERS:
                parts.append(self.in_memory_order(place)[low - place.start : high - place.start])
            elif (stored := self.entry(place.name).slots.get(slot)) is None:
                return None
            elif place.strides is not None and stored.strides is None:
                parts.append(self._in_memory_order(place, stored)[low - place.start : high - place.start])
            else:
                parts.append(self.elements(stored, low - place.start, high - place.start))
        return torch.cat(parts) if parts else torch.empty(0)

    def updates(self) -> dict[str, int]:
        """How many optimiser steps each trained parameter took part in, by name."""
        if not self._shards:
            return {
                place.name: int(self.elements(stored, 0, 1).item())
                for place in self.layout.places
                if (stored := self.entry(place.name).slots.get(UPDATES)) is not None
            }
        found: dict[str, int] = {}
        begins: dict[int, int] = {}
        for _, header in self._shards:
            count = json.loads(header.metadata["optimizer"])[1]
            missed = json.loads(header.metadata.get("missed", "[]"))
            for vector in {place.vector for place in self.layout.places}:
                begin = begins.get(vector, 0)
                begins[vector] = end = begin + header.length(f"{vector}.{PARAMETERS}")
                for place in self.places(vector):
                    if begin <= place.start < end or (
                        place.name not in found and begin < place.stop and place.start < end
                    ):
                        at = max(place.start, begin) - begin
                        gone = next(
                            (n for start, stop, n in (missed[vector] if missed else ()) if start <= at < stop), 0
                        )
                        found[place.name] = count - gone
        return found

    def own_state(self, name: str, block: Block) -> dict[str, torch.Tensor]:
        """What an optimizer of the user's own keeps of a trained parameter: of what has its shape this block, the rest as it is; by key."""
        return {
            f"{slot}.{name}": self.block(stored, block)
            if slot.startswith(OWN_STATE)
            else self._file(stored.pieces[0].file).get_tensor(stored.pieces[0].key)
            for slot, stored in self.entry(name).slots.items()
            if slot.startswith((OWN_STATE, OWN_NUMBER))
        }

    def whole(self, name: str) -> torch.Tensor:
        """A tensor that is not trained, such as a buffer: in its shape and dtype, on the CPU."""
        entry = self.entry(name)
        if len(entry.pieces) > 1:
            return self.elements(entry, 0, prod(entry.shape)).view(entry.shape)
        piece = entry.pieces[0]
        return self._file(piece.file).get_tensor(piece.key)  # type: ignore[no-any-return]

    def tensor(self, name: str) -> torch.Tensor:
        """Any tensor of state_dict(): in its shape and dtype, on the CPU. Raises WrongInput when it is missing or damaged."""
        entry = self.entry(name)
        if not prod(entry.shape):
            return self.whole(name)
        flat = self.elements(entry, 0, prod(entry.shape))
        return flat.view(entry.shape) if entry.strides is None else flat.as_strided(entry.shape, entry.strides)

    def sources(self) -> dict[str, Source]:
        """The tensors of `state_dict()`, to be read while this is open. A piece has at most PIECE elements, unless the tensor lies in
        another order in memory than in its shape."""
        names = [name for name in self.manifest.tensors if not name.endswith(EXTRA_JSON) and PART not in name]
        return {
            name: Source(tensor_file.dtype_of(entry.dtype), tuple(entry.shape), partial(self._in_pieces, name))
            for name in names
            for entry in [self.entry(name)]
        }

    def _in_pieces(self, name: str) -> Iterator[torch.Tensor]:
        entry = self.entry(name)
        count = prod(entry.shape)
        if count <= PIECE or entry.strides is not None:
            yield self.tensor(name)
            return
        for start in range(0, count, PIECE):
            yield self.elements(entry, start, min(start + PIECE, count))

    @property
    def untrained(self) -> list[str]:
        """The names of all tensors that are not trained."""
        trained = {place.name for place in self.layout.places} | self.layout.aliases.keys()
        return [name for name in self.manifest.tensors if name not in trained]

    def _range(self, file: str, key: str, start: int, stop: int) -> torch.Tensor:
        view = self._file(file).get_slice(key)
        shape = view.get_shape()
        if len(shape) == 1:
            return view[start:stop]  # type: ignore[no-any-return]
        return self._file(file).get_tensor(key).reshape(-1)[start:stop]  # type: ignore[no-any-return]

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt").__enter__()  # type: ignore[no-untyped-call]
            except (OSError, SafetensorError) as error:
                raise WrongInput(f"{self.folder / name} cannot be read: {error}") from None
        return self._files[name]


def load_model(folder: Path, model: nn.Module, *, source: str) -> None:
    """Gives a model the parameters and buffers of a checkpoint, of whichever strategy, trained or not.

    source: whose checkpoint it is, for messages. Raises WrongInput, which names the tensors, when the model fits only in part.
    """
    with NamedCheckpoint(folder) as checkpoint:
        _require_tensors_fit(checkpoint, model, source)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if tensors.can_be_saved(parameter):
                    parameter.copy_(checkpoint.tensor(name))
        buffers = {name: checkpoint.tensor(name) for name in tensors.buffers_of(model)}
    tensors.put_buffers(model, buffers, source=source)


def require_fit(folder: Path, model: nn.Module, *, source: str) -> None:
    """Raises WrongInput as `load_model` does, and changes nothing."""
    with NamedCheckpoint(folder) as checkpoint:
        _require_tensors_fit(checkpoint, model, source)


def _require_tensors_fit(checkpoint: NamedCheckpoint, model: nn.Module, source: str) -> None:
    theirs = checkpoint.manifest.tensors
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if tensors.can_be_saved(p)}
    once = {name for name, _ in model.named_parameters()}  # a tied one may have been stored under one of its names
    ours = parameters | tensors.buffers_of(model)
    lacks = [name for name in ours if name not in theirs and (name in once or name not in parameters)]
    unknown = [name for name in theirs if name not in ours and name not in checkpoint.layout.aliases]
    differ = [
        f"{name} ({there} there, {here} here)"
        for name, tensor in ours.items()
        if name in theirs and extra_state.module_of(name) is None and not composite.is_part(name)
        for there, here in [(_form(theirs[name].dtype, theirs[name].shape), _form_of(tensor))]
        if there != here
    ]
    said = [
        f"{what}: {resuming.listed(names)}"
        for what, names in (("not there", lacks), ("not in trainer.model", unknown), ("of another form", differ))
        if names
    ]
    if said:
        raise WrongInput(
            f"trainer.model: the model of {source} fits only in part: {'; '.join(said)}. Make names, shapes and types the same, or leave "
            "checkpoint.from out"
        )


def _form_of(tensor: torch.Tensor) -> str:
    return _form(tensor_file.name_of(tensor.dtype), tuple(tensor.shape))


def _form(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
