"""Samples as columns of bytes, and back. Nothing is pickled: what is stored are numbers, texts and bytes, and so is what is read.

A sample is a tree of tuples, lists and dicts with leaves. All samples of a data set have one `Structure`; the tensors of a leaf may differ
in shape. A *block* is some samples, stored leaf by leaf: a column of equal shapes is one array, so that a batch is a few copies of rows.

A stored block: the length of a header in 4 bytes, little-endian; the header, JSON, which says for each leaf where its column begins and
which shapes or lengths its values have; the columns, each from a multiple of 64 bytes on.
"""

import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT: Final = 64
_LENGTH: Final = struct.Struct("<I")
_PLAIN: Final = {"int": "<i8", "float": "<f8", "bool": "|b1"}
"""Python's own numbers, and how they are stored."""
_TEXTS: Final = ("str", "bytes")
_BITS: Final = {torch.bfloat16: "<i2", torch.float8_e4m3fn: "|u1", torch.float8_e5m2: "|u1"}
"""Types that numpy does not have, and those of their bits."""
_TENSORS: Final = {str(dtype).removeprefix("torch."): dtype for dtype in _BITS} | {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}


class Unstorable(ValueError):
    """A sample that cannot be stored; the text names the place in the sample and what is there."""


@dataclass(frozen=True, slots=True)
class Structure:
    """The shape of a tree, or a leaf of it."""

    kind: str
    """tuple, list, dict, or of a leaf: tensor, array, scalar (of numpy), int, float, bool, str, bytes, none."""
    dtype: str = ""
    """Of a leaf of numbers: torch's name (float32), numpy's (<f4) for an array or scalar."""
    keys: tuple[str, ...] = ()
    items: "tuple[Structure, ...]" = ()

    def to_json(self) -> dict[str, Any]:
        """For the index of a data set."""
        found: dict[str, Any] = {"kind": self.kind}
        if self.dtype:
            found["dtype"] = self.dtype
        if self.keys:
            found["keys"] = list(self.keys)
        if self.items:
            found["items"] = [item.to_json() for item in self.items]
        return found

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Structure":
        """Raises KeyError, TypeError or ValueError for what `to_json` does not write."""
        items = tuple(cls.from_json(item) for item in value.get("items", ()))
        found = cls(str(value["kind"]), str(value.get("dtype", "")), tuple(map(str, value.get("keys", ()))), items)
        if found.kind == "tensor" and found.dtype not in _TENSORS:
            raise ValueError(f"no tensor of type {found.dtype!r} is known")
        return found

    def leaves(self) -> Iterator["Structure"]:
        """The leaves, from the left."""
        if self.kind in ("tuple", "list", "dict"):
            for item in self.items:
                yield from item.leaves()
        else:
            yield self

    def __str__(self) -> str:
        if self.kind == "dict":
            return "{" + ", ".join(f"{key}: {item}" for key, item in zip(self.keys, self.items, strict=True)) + "}"
        if self.kind in ("tuple", "list"):
            return f"{self.kind}({', '.join(map(str, self.items))})"
        return f"{self.kind} of {self.dtype}" if self.dtype else self.kind


def structure_of(sample: Any, place: str = "") -> Structure:
    """The structure of a sample. Raises Unstorable for what is neither numbers, text nor bytes."""
    if isinstance(sample, torch.Tensor):
        name = str(sample.dtype).removeprefix("torch.")
        if sample.layout is not torch.strided or sample.is_quantized or name not in _TENSORS:
            raise Unstorable(f"{_at(place)} a {sample.layout} tensor of {sample.dtype}".replace("torch.", ""))
        return Structure("tensor", name)
    if isinstance(sample, np.ndarray | np.generic):
        if sample.dtype.hasobject or sample.dtype.kind == "V":
            raise Unstorable(f"{_at(place)} a numpy array of {sample.dtype}")
        return Structure("array" if isinstance(sample, np.ndarray) else "scalar", sample.dtype.str)
    if sample is None:
        return Structure("none")
    kind = type(sample)
    if kind in (tuple, list):
        return Structure(kind.__name__, items=tuple(structure_of(x, f"{place}[{i}]") for i, x in enumerate(sample)))
    if kind is dict:
        for key in sample:
            if type(key) is not str:
                raise Unstorable(f"{_at(place)} a dict with the key {key!r}")
        return Structure(
            "dict", "", tuple(sample), tuple(structure_of(x, f"{place}[{k!r}]") for k, x in sample.items())
        )
    if kind is int and not -(1 << 63) <= sample < 1 << 63:
        raise Unstorable(f"{_at(place)} an int of more than 64 bits")
    if kind in (int, float, bool, str, bytes):
        return Structure(kind.__name__)
    raise Unstorable(f"{_at(place)} a {kind.__module__}.{kind.__qualname__}".replace("builtins.", ""))


def _at(place: str) -> str:
    return f"sample{place} is"


def leaves_of(sample: Any) -> Iterator[Any]:
    """The values of a sample's leaves, from the left."""
    if isinstance(sample, tuple | list):
        for item in sample:
            yield from leaves_of(item)
    elif isinstance(sample, dict):
        for item in sample.values():
            yield from leaves_of(item)
    else:
        yield sample


def bytes_of(sample: Any) -> int:
    """About how many bytes of a block the sample takes."""
    return sum(_size(value) for value in leaves_of(sample))


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor | np.ndarray):
        return int(value.nbytes)
    return 8 + (len(value) if isinstance(value, str | bytes) else 0)


def encode(structure: Structure, samples: Sequence[Any]) -> bytes:
    """The block of these samples, each of which has the structure."""
    columns = list(zip(*(leaves_of(sample) for sample in samples), strict=True))
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    end = 0
    for leaf, values in zip(structure.leaves(), columns, strict=True):
        description, data = _encode(leaf, values)
        end += -end % _ALIGNMENT
        described.append({"at": end, **description})
        parts.append(data)
        end += len(data)
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-(_LENGTH.size + len(header)) % _ALIGNMENT)
    block = bytearray(_LENGTH.pack(len(header)) + header)
    for data in parts:
        block += bytes(-len(block) % _ALIGNMENT) + data
    return bytes(block)


def _encode(leaf: Structure, values: Sequence[Any]) -> tuple[dict[str, Any], bytes]:
    if leaf.kind == "none":
        return {}, b""
    if leaf.kind in _TEXTS:
        texts = [value.encode("utf-8", "surrogatepass") if leaf.kind == "str" else value for value in values]
        return {"lengths": [len(text) for text in texts]}, b"".join(texts)
    arrays = [_as_array(leaf, value) for value in values]
    shapes = [list(array.shape) for array in arrays]
    shape = {"shape": shapes[0]} if all(shape == shapes[0] for shape in shapes) else {"shapes": shapes}
    return shape, b"".join(array.tobytes() for array in arrays)


def _as_array(leaf: Structure, value: Any) -> NDArray[Any]:
    if leaf.kind == "tensor":
        tensor = value.detach().cpu().contiguous()
        bits = _BITS.get(tensor.dtype)
        return np.asarray(
            tensor.view(torch.int16 if bits == "<i2" else torch.uint8).numpy() if bits else tensor.numpy()
        )
    return np.asarray(value, dtype=_stored(leaf))


def _stored(leaf: Structure) -> np.dtype[Any]:
    """The numpy type in which a leaf's numbers are stored."""
    if leaf.kind == "tensor":
        dtype = _TENSORS[leaf.dtype]
        return np.dtype(_BITS.get(dtype, leaf.dtype)).newbyteorder("<")
    return np.dtype(_PLAIN.get(leaf.kind) or leaf.dtype)


class Column:
    """The values of one leaf in a block."""

    __slots__ = ("_bounds", "_data", "_leaf", "_shapes", "rows")

    def __init__(self, leaf: Structure, described: dict[str, Any], data: memoryview, count: int) -> None:
        """Raises KeyError, TypeError or ValueError when the data is not as described."""
        self._leaf, self._data = leaf, data
        self.rows: NDArray[Any] | None = None
        """All values as one array, shape (samples, *shape), read-only; None where they have no one shape."""
        self._bounds: list[int] = []
        self._shapes: list[Any] = []
        at = int(described["at"])
        if leaf.kind == "none":
            return
        if leaf.kind in _TEXTS:
            lengths = described["lengths"]
        else:
            dtype = _stored(leaf)
            if "shape" in described:
                shape = (count, *described["shape"])
                self.rows = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
                return
            self._shapes = described["shapes"]
            lengths = [math.prod(shape) * dtype.itemsize for shape in self._shapes]
        self._bounds = [at, *(at + np.cumsum(lengths)).tolist()]
        if len(lengths) != count or self._bounds[-1] > len(data):
            raise ValueError("it ends too early")

    def value(self, row: int) -> Any:
        """The value of a sample, a copy that its owner may change."""
        leaf = self._leaf
        if leaf.kind == "none":
            return None
        if self.rows is not None:
            found = self.rows[row]
        else:
            data = bytes(self._data[self._bounds[row] : self._bounds[row + 1]])
            if leaf.kind == "bytes":
                return data
            if leaf.kind == "str":
                return data.decode("utf-8", "surrogatepass")
            found = np.frombuffer(data, _stored(leaf)).reshape(self._shapes[row])
        if leaf.kind == "tensor":
            return as_tensor(leaf, np.array(found))
        if leaf.kind == "array":
            return np.array(found)
        return found[()] if leaf.kind == "scalar" else found.item()


def as_tensor(leaf: Structure, rows: NDArray[Any]) -> torch.Tensor:
    """The numbers of a leaf as torch has them. rows: an array of their own, as they are stored."""
    tensor = torch.from_numpy(rows)
    return tensor.view(_TENSORS[leaf.dtype]) if leaf.kind == "tensor" and _TENSORS[leaf.dtype] in _BITS else tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Samples that were stored together."""

    structure: Structure
    columns: tuple[Column, ...]
    size: int
    """Bytes in memory."""

    def sample(self, row: int) -> Any:
        """One of them, counted from 0."""
        return grown(self.structure, iter([column.value(row) for column in self.columns]))


def decode(structure: Structure, data: bytes, count: int) -> Block:
    """The block of `encode`. Raises ValueError when the data is none of this structure and number of samples."""
    try:
        start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
        described = json.loads(data[_LENGTH.size : start])
        view = memoryview(data)[start:]
        columns = tuple(Column(leaf, d, view, count) for leaf, d in zip(structure.leaves(), described, strict=True))
    except (KeyError, TypeError, ValueError, IndexError, struct.error) as error:
        raise ValueError(f"it is no block of {count} samples: {error}") from None
    return Block(structure, columns, len(data))


def grown(structure: Structure, values: Iterator[Any], *, collated: bool = False) -> Any:
    """The tree with these values at its leaves. collated: a batch, in which a tuple becomes a list, as torch's default_collate has it."""
    if structure.kind in ("tuple", "list"):
        items = [grown(item, values, collated=collated) for item in structure.items]
        return items if collated or structure.kind == "list" else tuple(items)
    if structure.kind == "dict":
        return {
            k: grown(item, values, collated=collated) for k, item in zip(structure.keys, structure.items, strict=True)
        }
    return next(values)
