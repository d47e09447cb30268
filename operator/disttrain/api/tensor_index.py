"""Where each tensor of a model lies in the files of a checkpoint: what a manifest says by name, and what the headers of the files say.

Shared by the trainer, which writes it, and `disttrain export`, which reads it without torch. The files are safetensors
(https://github.com/huggingface/safetensors#format): a length, a JSON header, the bytes of the tensors.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from disttrain.api.base import Model

LAYOUT = "model-layout"
"""The key of a header's metadata under which a file says how the model lies in flat vectors: the JSON of a `Layout`."""
FROZEN = "frozen:"
"""How the key of a parameter that is not trained begins in the file that a worker adds to the shards of servers."""
SCRIPT = "session:"
"""How the key of a tensor begins there that is no part of the model, but of the state that a script keeps (session.checkpoint)."""
MODEL = "model."
"""How the key of a tensor of the model begins in the file of a collective, which has all of it."""
EXTRA_JSON = "_extra_state.json"
"""How the name of a module's extra state ends that is JSON: its text as bytes. It is no tensor of state_dict()."""
UPDATES = "updates"
"""The slot of a parameter with the number of updates that it has seen."""
OWN_STATE = "state:"
"""How the slot of a state begins that an optimizer of the user's own keeps in the shape of its parameter (trainer.optimizer.factory)."""
OWN_NUMBER = "number:"
"""The same of a state in another shape, such as a count of steps: it is not cut, and every file that has it has all of it."""
BLOCKS = "blocks"
"""The key of a header's metadata under which the file of a sharded rank says what it holds: the JSON of `Blocks`."""
PART = "::"
"""What separates the name of a tensor that safetensors cannot hold (sparse, complex128) from that of its part. It is none of
state_dict() itself."""
_MOST_HEADER = 100_000_000
"""Bytes: what safetensors itself accepts."""


class Place(Model):
    """Where a trained parameter lies in a vector, in elements."""

    name: str
    vector: int
    start: int
    stop: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    """In elements; None for those of a contiguous tensor."""


class Layout(Model):
    """How a model's trained parameters lie in flat vectors, and which parameters have several names."""

    places: tuple[Place, ...]
    aliases: dict[str, str] = Field(default_factory=dict)
    """Another name of a parameter -> the name that it is stored under."""


class Piece(Model):
    """Elements [start, start + length) of a tensor, which lie from `offset` on in the tensor `key` of a file.

    With `count` runs, also those of the same length that begin `stride`, 2 x `stride` … elements later; in the file one run follows the
    other. So lie the rows of a block of columns.
    """

    file: str
    key: str
    offset: int = Field(0, ge=0)
    start: int = Field(0, ge=0)
    length: int = Field(ge=0)
    count: int = Field(1, ge=1)
    stride: int = Field(0, ge=0)

    @model_serializer(mode="wrap")
    def _without_runs(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A piece of one run as older releases read it."""
        found: dict[str, Any] = serialize(self)
        return found if self.count > 1 else {key: found[key] for key in found if key not in ("count", "stride")}

    def runs(self) -> Iterator["Piece"]:
        """The runs, each as a piece of its own."""
        for number in range(self.count):
            yield Piece(
                file=self.file,
                key=self.key,
                offset=self.offset + number * self.length,
                start=self.start + number * self.stride,
                length=self.length,
            )


class Block(Model):
    """The block of a tensor that a file holds: of dimension d the elements [offsets[d], offsets[d] + sizes[d])."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Block":
        """All of a tensor."""
        return cls(shape=shape, offsets=(0,) * len(shape), sizes=shape)

    def cut(self, dimension: int, *, parts: int, number: int) -> "Block":
        """The part `number` of so many that torch.chunk makes: the first ones are filled first, the last ones may be empty."""
        length = self.sizes[dimension]
        each = -(-length // parts)
        begin, end = min(number * each, length), min((number + 1) * each, length)
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dimension] += begin
        sizes[dimension] = end - begin
        return Block(shape=self.shape, offsets=tuple(offsets), sizes=tuple(sizes))

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return prod(self.sizes)

    def piece(self, file: str, key: str) -> Piece:
        """Where its elements lie in the whole tensor, when `key` of the file holds them in order.

        Raises ValueError for a block that is cut in two dimensions beyond the first: its runs have no common stride.
        """
        cut = [d for d in range(len(self.shape)) if self.sizes[d] != self.shape[d]]
        inner = cut[-1] if cut else 0
        if any(0 < d < inner for d in cut):
            raise ValueError(
                f"a block of {self.sizes} in {self.shape} is cut in more than the first and one more dimension"
            )
        behind = [prod(self.shape[d + 1 :]) for d in range(len(self.shape))]
        start = sum(offset * size for offset, size in zip(self.offsets, behind, strict=True))
        if inner == 0:
            return Piece(file=file, key=key, start=start, length=self.elements)
        length = self.sizes[inner] * behind[inner]
        return Piece(
            file=file, key=key, start=start, length=length, count=self.elements // length, stride=behind[inner - 1]
        )


class Blocks(Model):
    """What the file of a sharded rank holds: `model.<name>` a block of a tensor, `<slot>.<name>` the same block of an optimiser's slot; of
    OWN_NUMBER all."""

    blocks: dict[str, Block]
    """By the names of state_dict(). None is empty."""


class Stored(Model):
    """The elements of one tensor."""

    dtype: str
    """As safetensors names it, such as F32."""
    strides: tuple[int, ...] | None = None
    """In which order the elements lie; None: in the order of a contiguous tensor."""
    pieces: tuple[Piece, ...]


class Entry(Stored):
    """A tensor of `state_dict()`, and what the optimiser keeps beside it."""

    shape: tuple[int, ...]
    slots: dict[str, Stored] = Field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Any]
    """By key: dtype, shape, data_offsets."""
    data: int
    """Where the bytes of the tensors begin in the file."""

    def length(self, key: str) -> int:
        """The number of elements of a tensor."""
        count = 1
        for size in self.tensors[key]["shape"]:
            count *= size
        return count


def read_header(path: Path) -> Header:
    """The header of a file. Raises OSError, and ValueError when the file is none of safetensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _MOST_HEADER:
            raise ValueError(f"{path.name} is no safetensors file")
        tensors = json.loads(file.read(length))
    if not isinstance(tensors, dict):
        raise ValueError(f"{path.name} is no safetensors file")
    return Header(metadata=tensors.pop("__metadata__", {}), tensors=tensors, data=8 + length)


def index_of(folder: Path, files: Mapping[str, str]) -> dict[str, Entry]:
    """Every tensor of the model by name, from the headers of a checkpoint's files; nothing when none of them says how the model lies.

    Raises OSError, ValueError.
    """
    headers = {name: read_header(folder / name) for name in sorted(files) if name.endswith(".safetensors")}
    layout = next(
        (Layout.model_validate_json(h.metadata[LAYOUT]) for h in headers.values() if LAYOUT in h.metadata), None
    )
    if layout is None:
        return {}
    found: dict[str, Entry] = {}
    shards: list[tuple[int, str]] = []
    for name, header in headers.items():
        if BLOCKS in header.metadata:
            _add_blocks(found, name, header)
        elif "server" in header.metadata:
            shards.append((json.loads(header.metadata["server"])[0], name))
        elif any(key.startswith(MODEL) for key in header.tensors):  # of a collective: all of it
            found |= _whole(name, header, prefix=MODEL)
            found |= {
                place.name: _with_slots(found[place.name], place, layout, name, header) for place in layout.places
            }
        else:  # of a worker of servers
            found |= _whole(name, header, prefix=FROZEN) | _whole(name, header, prefix="")
    if shards:
        found |= dict(_of_shards([name for _, name in sorted(shards)], headers, layout))
    for alias, name in layout.aliases.items():
        if name in found:
            found[alias] = found[name].model_copy(update={"slots": {}})
    return found


def _whole(file: str, header: Header, *, prefix: str) -> dict[str, Entry]:
    """The tensors that the file holds whole, and whose keys begin so."""
    return {
        key.removeprefix(prefix): Entry(
            dtype=described["dtype"],
            shape=described["shape"],
            pieces=(Piece(file=file, key=key, length=header.length(key)),),
        )
        for key, described in header.tensors.items()
        if key.startswith(prefix) and (prefix or not key.startswith((FROZEN, SCRIPT)))
    }


def _add_blocks(found: dict[str, Entry], file: str, header: Header) -> None:
    """Adds the blocks of a file to the tensors, of which other files may hold other blocks."""
    blocks = Blocks.model_validate_json(header.metadata[BLOCKS]).blocks
    for key, described in header.tensors.items():
        slot, _, name = key.partition(".")
        block, dtype = blocks[name], described["dtype"]
        entry = found.setdefault(name, Entry(dtype=dtype, shape=block.shape, pieces=()))
        if f"{slot}." == MODEL:
            update: dict[str, Any] = {"dtype": dtype, "pieces": (*entry.pieces, block.piece(file, key))}
        elif slot == UPDATES or slot.startswith(OWN_NUMBER):  # every file has all of it
            pieces = (Piece(file=file, key=key, length=header.length(key)),)
            update = {"slots": entry.slots | {slot: Stored(dtype=dtype, pieces=pieces)}}
        else:
            before = entry.slots[slot].pieces if slot in entry.slots else ()
            stored = Stored(dtype=dtype, pieces=(*before, block.piece(file, key)))
            update = {"slots": entry.slots | {slot: stored}}
        found[name] = entry.model_copy(update=update)


def _with_slots(entry: Entry, place: Place, layout: Layout, file: str, header: Header) -> Entry:
    """The entry with the optimiser's state, which a collective keeps in flat vectors."""
    slots = {}
    own = f"optimizer.{place.vector}."
    for key, described in header.tensors.items():
        if key.startswith((OWN_STATE, OWN_NUMBER)) and key.partition(".")[2] == place.name:
            pieces = (Piece(file=file, key=key, length=header.length(key)),)
            slots[key.partition(".")[0]] = Stored(dtype=described["dtype"], pieces=pieces)
        if not key.startswith(own):
            continue
        if key == f"{own}updates":  # one number for each parameter of the vector
            number = [other.name for other in layout.places if other.vector == place.vector].index(place.name)
            pieces = (Piece(file=file, key=key, offset=number, length=1),)
            slots["updates"] = Stored(dtype=described["dtype"], pieces=pieces)
            continue
        pieces = (Piece(file=file, key=key, offset=place.start, length=place.stop - place.start),)
        slots[key.removeprefix(own)] = Stored(dtype=described["dtype"], strides=place.strides, pieces=pieces)
    return entry.model_copy(update={"slots": slots})


def _of_shards(files: list[str], headers: Mapping[str, Header], layout: Layout) -> Iterator[tuple[str, Entry]]:
    """The parameters of a model whose vectors are cut over servers, in this order."""
    cuts: dict[int, list[tuple[int, str]]] = {}
    """By vector: where each server's part begins, and its file."""
    for place in layout.places:
        if place.vector not in cuts:
            begin, parts = 0, []
            for file in files:
                parts.append((begin, file))
                begin += headers[file].length(f"{place.vector}.parameters")
            cuts[place.vector] = parts
        own = f"{place.vector}."
        stored = {}
        for key in headers[files[0]].tensors:
            if not key.startswith(own):
                continue
            pieces = []
            for begin, file in cuts[place.vector]:
                start, stop = max(place.start, begin), min(place.stop, begin + headers[file].length(key))
                if start < stop:
                    at = start - place.start
                    pieces.append(Piece(file=file, key=key, offset=start - begin, start=at, length=stop - start))
            dtype = headers[files[0]].tensors[key]["dtype"]
            stored[key.removeprefix(own)] = Stored(dtype=dtype, strides=place.strides, pieces=tuple(pieces))
        whole = stored.pop("parameters")
        yield (
            place.name,
            Entry(dtype=whole.dtype, strides=place.strides, pieces=whole.pieces, shape=place.shape, slots=stored),
        )
