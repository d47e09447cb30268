"""Named tensors in a file: safetensors, never pickle, so that reading it cannot run code.

Format: https://github.com/huggingface/safetensors#format. Our own writer, which needs no copy of the tensors and digests them as they are
written; tensors that share memory are each written under their own name. Reading is the library's.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from disttrain.api import digests
from disttrain_trainer.checkpoint import atomic
from disttrain_trainer.errors import WrongInput

Named = Mapping[str, torch.Tensor]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = atomic.PAGE
"""Bytes: the data begins at a multiple of it, so that a mapped file holds aligned numbers and a copy is written as it lies."""

_NAMES = {name: dtype for dtype, name in _DTYPES.items()}

_LENGTH = 8
"""Bytes before the header, which say how long it is."""


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor that is read as it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterable[torch.Tensor]]
    """Its elements in order, in pieces of any shape."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Source":
        return cls(tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Sources = Mapping[str, Source]


def can_hold(dtype: torch.dtype) -> bool:
    """Whether safetensors has this dtype."""
    return dtype in _DTYPES


def name_of(dtype: torch.dtype) -> str:
    """The name that safetensors gives a dtype, such as F32. Raises KeyError for one that it does not have."""
    return _DTYPES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """The dtype that safetensors gives a name. Raises KeyError."""
    return _NAMES[name]


def write(
    path: Path, tensors: Named | Sources, metadata: Mapping[str, str] | None = None, *, algorithm: str = digests.XXH3
) -> str:
    """Writes a file atomically; its digest. Raises OSError, and what a source raises.

    tensors: dense, of types that the format has, on any device; or where they are read from, a piece at a time.
    """
    sources = {name: one if isinstance(one, Source) else Source.of(one) for name, one in tensors.items()}
    names = in_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        source = sources[name]
        start, end = end, end + source.bytes
        header[name] = {"dtype": _DTYPES[source.dtype], "shape": list(source.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH) % _ALIGNMENT)

    def fill(sink: atomic.Sink) -> None:
        sink.write(len(text).to_bytes(_LENGTH, "little") + text)
        for name in names:
            for piece in sources[name].read():
                sink.write(_bytes(piece))

    return atomic.write(path, fill, algorithm)


def in_order(tensors: Named | Sources) -> list[str]:
    """The names as their tensors lie in a file. Wide types first: then each is aligned without gaps, which the format does not allow."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, in their shapes and dtypes, on the CPU. Raises WrongInput when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise WrongInput(f"{path} cannot be read: {error}") from None


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in order."""
    flat = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return flat.view(torch.uint8).numpy().data
