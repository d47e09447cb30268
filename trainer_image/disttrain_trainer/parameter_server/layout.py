"""A model as flat vectors, one per dtype, and the cuts between servers.

The trainable parameters in `named_parameters` order (tied ones once) become views of one vector per dtype, and so do their
gradients: what a worker sends and receives is memory that autograd and the network share, and nothing is copied. Server i owns
the contiguous range [cut_i, cut_i+1) of every vector, equal by bytes and aligned to 64.

Frozen parameters and buffers (BatchNorm's running statistics) stay with the worker; a checkpoint has the buffers of one worker.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.parameter_server.memory import zeros

ALIGNMENT = 64
"""Bytes: a cache line, and the widest SIMD register."""

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of parameters, by the name on the wire and in files."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Vectors = Sequence[torch.Tensor]
"""One contiguous CPU tensor of one dimension for each vector of a layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """One flat vector of a model."""

    dtype: str
    length: int
    """Elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The part of one vector that a server owns: elements [start, stop)."""

    dtype: torch.dtype
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Elements."""
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model lies in flat vectors; equal for all workers of a job."""

    vectors: tuple[Vector, ...]
    digest: str
    """sha256 over names, shapes and dtypes, in order: two models with the same digest exchange parameters."""

    def __str__(self) -> str:
        sizes = ", ".join(f"{vector.length} x {vector.dtype}" for vector in self.vectors)
        return f"{sizes}, digest {self.digest[:8]}"

    @classmethod
    def of(cls, module: nn.Module) -> "Layout":
        """The layout of the module's trainable parameters. WrongInput when there are none, or one of another dtype than DTYPES."""
        lengths: dict[str, int] = {}
        described = []
        for name, parameter in trainable(module):
            dtype = _NAMES.get(parameter.dtype)
            if dtype is None:
                raise WrongInput(
                    f"trainer.model: parameter {name} is {parameter.dtype}; our loop trains {', '.join(DTYPES)}"
                    + ("; keep it as a real one, torch.view_as_real" if parameter.is_complex() else "")
                )
            lengths[dtype] = lengths.get(dtype, 0) + parameter.numel()
            described.append((name, dtype, tuple(parameter.shape)))
        if not lengths:
            raise WrongInput("trainer.model: the model has no trainable parameter")
        return cls(
            vectors=tuple(Vector(dtype=dtype, length=length) for dtype, length in lengths.items()),
            digest=hashlib.sha256(json.dumps(described).encode()).hexdigest(),
        )

    def spans(self, *, server: int, servers: int) -> tuple[Span, ...]:
        """What this server of so many owns: one span for each vector, possibly empty."""
        result = []
        for vector in self.vectors:
            dtype = DTYPES[vector.dtype]
            at = cuts(length=vector.length, itemsize=dtype.itemsize, servers=servers)
            result.append(Span(dtype=dtype, start=at[server], stop=at[server + 1]))
        return tuple(result)


def cuts(*, length: int, itemsize: int, servers: int) -> tuple[int, ...]:
    """Where a vector is cut: servers + 1 element numbers from 0 to length, each but the last a multiple of ALIGNMENT bytes.

    The parts differ by at most ALIGNMENT bytes, and by the remainder of the vector.
    """
    lines, unit = length * itemsize // ALIGNMENT, ALIGNMENT // itemsize
    return (*(lines * server // servers * unit for server in range(servers)), length)


class FlatModel:
    """A module whose parameters and gradients are views of flat vectors.

    Moves the values of the module's parameters into `parameters`; a write to either is seen in the other. Call `zero_grad` here and
    not on the module, which would throw the views away. WrongInput when the parameters lie on several devices.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layout = Layout.of(module)
        self._module = module
        named = list(trainable(module))
        devices = {parameter.device for _, parameter in named}
        if len(devices) > 1:
            raise WrongInput(f"the parameters lie on several devices: {', '.join(sorted(map(str, devices)))}")
        device = devices.pop()
        self.parameters = tuple(zeros(v.length, DTYPES[v.dtype], device) for v in self.layout.vectors)
        """The values, one vector for each dtype."""
        self._gradients = tuple(zeros(v.length, DTYPES[v.dtype], device) for v in self.layout.vectors)
        self._views: list[tuple[nn.Parameter, torch.Tensor]] = []
        position = dict.fromkeys((vector.dtype for vector in self.parameters), 0)
        values, gradients = ({v.dtype: v for v in vectors} for vectors in (self.parameters, self._gradients))
        with torch.no_grad():
            for _, parameter in named:
                dtype, start = parameter.dtype, position[parameter.dtype]
                position[dtype] = stop = start + parameter.numel()
                view = values[dtype][start:stop].view(parameter.shape)
                view.copy_(parameter)
                parameter.data = view
                gradient = gradients[dtype][start:stop].view(parameter.shape)
                parameter.grad = gradient
                self._views.append((parameter, gradient))

    def zero_grad(self) -> None:
        """Sets every gradient to 0; call it before each backward."""
        for vector in self._gradients:
            vector.zero_()

    def gradients(self) -> tuple[torch.Tensor, ...]:
        """The gradients, one vector for each dtype; 0 where backward did not come by.

        Some user code replaces `parameter.grad` (or sets it to None): that gradient is copied back into its place.
        """
        for parameter, view in self._views:
            if parameter.grad is None:
                view.zero_()
                parameter.grad = view
            elif parameter.grad is not view:
                view.copy_(parameter.grad)
                parameter.grad = view
        return self._gradients


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of one dimension, writable."""
    return tensor.detach().view(torch.uint8).numpy().data


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a layout, in its order."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def norm(vectors: Vectors) -> float:
    """The Euclidean norm over all of them."""
    return math.hypot(*(float(torch.linalg.vector_norm(vector)) for vector in vectors))
