"""A model as flat vectors, one per dtype, and the cuts between servers.

The trainable parameters in `named_parameters` order (tied ones once) become views of one vector per dtype, and so do their
gradients: what a worker sends and receives is memory that autograd and the network share, and nothing is copied. Server i owns
the contiguous range [cut_i, cut_i+1) of every vector, equal by bytes and aligned to 64.

Frozen parameters and buffers (BatchNorm's running statistics) stay with the worker; a checkpoint has the buffers of one worker.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from disttrain.api import tensor_index
from disttrain_trainer.checkpoint import tensors
from disttrain_trainer.errors import UserError, WrongInput
from disttrain_trainer.runtime.memory import zeros

ALIGNMENT = 64
"""Bytes: a cache line, and the widest SIMD register."""

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of parameters, by the name on the wire and in files."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Vectors = Sequence[torch.Tensor]
"""One contiguous tensor of one dimension for each vector of a layout."""


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
class Place:
    """Where a parameter lies: elements [start, stop) of a vector."""

    name: str
    vector: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model lies in flat vectors; equal for all workers of a job."""

    vectors: tuple[Vector, ...]
    digest: str
    """sha256 over names, shapes, dtypes, and strides that are not contiguous, in order: two models with the same digest exchange
    parameters."""

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
            strides = () if parameter.is_contiguous() else (_strides(parameter),)
            described.append((name, dtype, tuple(parameter.shape), *strides))
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

    Moves the values of the module's parameters into `parameters`; a write to either is seen in the other. A parameter keeps its strides
    (channels_last). Call `zero_grad` here and not on the module, which would throw the views away. WrongInput when the parameters lie on
    several devices.
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
        self.took_part: list[bool] | None = None
        """Which of `places` had a gradient in the last step, as of the last call of `gradients`; None when all had one."""
        copy_into(self.parameters, module)
        self.places = tuple(place for place, _ in _placed(self.parameters, module))
        """Where each trained parameter lies, in the order of `parameters()`."""
        for place, (_, parameter) in zip(self.places, named, strict=True):
            parameter.data = _view(self.parameters[place.vector], place, parameter)
            # `.data`: a counter of versions of its own, where a plain view would share that of the whole vector.
            gradient = _view(self._gradients[place.vector], place, parameter).data
            parameter.grad = gradient
            self._views.append((parameter, gradient))
        self._versions = [gradient._version for _, gradient in self._views]
        self._parameter_versions = [parameter._version for parameter, _ in self._views]
        self._addresses = [parameter.data_ptr() for parameter, _ in self._views]
        self._frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
        self._known = {id(parameter): name for name, parameter in module.named_parameters()}
        self.change = "while the loss was computed (a clamp, or an embedding's max_norm)"
        """When the user's code may have changed a parameter, for `refuse_changed`."""

    def described(self) -> tensor_index.Layout:
        """Where each parameter lies, by name, for a checkpoint's manifest."""
        return described(self._module)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters of `places`."""
        return [parameter for parameter, _ in self._views]

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """The same by name."""
        return {place.name: parameter for place, parameter in zip(self.places, self.trained, strict=True)}

    def zero_grad(self) -> None:
        """Sets every gradient to 0; call it before each backward."""
        for vector in self._gradients:
            vector.zero_()
        self._versions = [view._version for _, view in self._views]

    def gradients(self) -> tuple[torch.Tensor, ...]:
        """The gradients, one vector for each dtype; 0 where backward did not come by. Sets `took_part`.

        Autograd adds to a gradient in place, which its counter of versions shows. Some user code replaces `parameter.grad` (or sets it to
        None): that gradient is copied back into its place.
        """
        took = [view._version != before for (_, view), before in zip(self._views, self._versions, strict=True)]
        for number, (parameter, view) in enumerate(self._views):
            gradient = parameter.grad
            if gradient is not view:
                took[number] = self._put_back(parameter, view)
        self.took_part = None if all(took) else took
        return self._gradients

    def refuse_own_backward(self) -> None:
        """Raises UserError when a parameter has a gradient before the loop's own backward. Call it after `zero_grad` and a loss. Cheap.

        It would count as often as there are parts and ranks, whatever their weights.
        """
        for (parameter, view), before, place in zip(self._views, self._versions, self.places, strict=True):
            gradient = parameter.grad
            if gradient is view and view._version == before:
                continue
            if gradient is not None and bool(gradient.any()):
                raise UserError(
                    f"trainer.loss calls backward() itself, as it seems: parameter {place.name} has a gradient before the loop calls it. "
                    "Leave that to the loop: return the sum of the losses, or take what the loss itself needs by torch.autograd.grad()"
                )

    def put_back(self, number: int) -> None:
        """Copies the gradient of one parameter into its place, if user code has replaced it."""
        parameter, view = self._views[number]
        if parameter.grad is not view:
            self._put_back(parameter, view)

    def refuse_cleared(self) -> None:
        """Raises UserError when code of the user's has cleared or replaced the gradients that the parts before have added up."""
        for place, (parameter, view) in zip(self.places, self._views, strict=True):
            if parameter.grad is not view:
                raise UserError(
                    f"the gradient of parameter {place.name} was cleared or replaced while the loss of a part was computed, and with it "
                    "what the parts before have added: leave zero_grad() and changes of .grad out of trainer.loss and trainer.model"
                )

    def verify(self) -> None:
        """Raises UserError when the module has other parameters than at the start, or they lie elsewhere; a walk over the module."""
        named = dict(self._module.named_parameters())
        if {id(parameter) for parameter in named.values()} != self._known.keys():
            new = [name for name, parameter in named.items() if id(parameter) not in self._known]
            gone = [name for key, name in self._known.items() if key not in set(map(id, named.values()))]
            change = f"parameter {new[0]} was added or replaced" if new else f"parameter {gone[0]} was removed"
            raise UserError(f"{change} after the training began; {_DECIDED}")
        for place, (parameter, _), address in zip(self.places, self._views, self._addresses, strict=True):
            if parameter.data_ptr() != address or parameter.dtype != self.parameters[place.vector].dtype:
                raise UserError(
                    f"parameter {place.name} was given other memory or another type after the training began, as by `.data = ` or "
                    f"`model.to(...)`; {_DECIDED}"
                )

    def is_finite(self) -> bool:
        """Whether every trained parameter is a number."""
        return all(tensors.is_finite(vector) for vector in self.parameters)

    def refuse_changed(self) -> None:
        """Raises UserError when code of the user's has changed a trained parameter in place, where a strategy would overwrite
        the change.

        What we write goes through the flat vectors, which a parameter's own counter of versions does not see. Cheap: call it in every
        step.
        """
        versions = [parameter._version for parameter, _ in self._views]
        if versions != self._parameter_versions:
            changed = next(i for i, version in enumerate(versions) if version != self._parameter_versions[i])
            raise UserError(
                f"parameter {self.places[changed].name} was changed in place {self.change}: under strategy ParameterServer the servers "
                "hold the parameters, and the change would be lost; leave it out, use strategy DataParallel, or freeze it (requires_grad = "
                "False) if it is a mean of others and not trained"
            )

    def refuse_unfrozen(self) -> None:
        """Raises UserError when a parameter that was frozen at the start requires a gradient now. Cheap: call it in every step."""
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise UserError(
                    f"parameter {name} was frozen (requires_grad = False) when the training began, and is not now: {_DECIDED}. Leave it "
                    "trainable there, and freeze it in trainer.loss until it is needed: without a gradient it stays as it is"
                )

    def _put_back(self, parameter: nn.Parameter, view: torch.Tensor) -> bool:
        """Makes `view` the parameter's gradient again, with the values that it has now; whether it has some."""
        gradient, parameter.grad = parameter.grad, view
        if gradient is None:
            view.data.zero_()  # without a new version: it took no part
            return False
        view.copy_(gradient.to_dense() if gradient.layout is not torch.strided else gradient)
        return True


def described(module: nn.Module) -> tensor_index.Layout:
    """Where each trained parameter lies, or would lie, in flat vectors, by name. WrongInput as `Layout.of`."""
    vectors = [torch.empty(0, dtype=DTYPES[vector.dtype]) for vector in Layout.of(module).vectors]
    placed = list(_placed(vectors, module))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return tensor_index.Layout(
        places=tuple(
            tensor_index.Place(
                name=place.name,
                vector=place.vector,
                start=place.start,
                stop=place.stop,
                shape=tuple(parameter.shape),
                strides=None if parameter.is_contiguous() else _strides(parameter),
            )
            for place, parameter in placed
        ),
        aliases={
            name: names[id(parameter)]
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if names[id(parameter)] != name
        },
    )


def copy_into(vectors: Vectors, module: nn.Module) -> None:
    """Copies the module's parameters to their places in the vectors of its layout."""
    with torch.no_grad():
        for place, parameter in _placed(vectors, module):
            _view(vectors[place.vector], place, parameter).copy_(parameter)


def _placed(vectors: Vectors, module: nn.Module) -> Iterator[tuple[Place, nn.Parameter]]:
    numbers = {vector.dtype: number for number, vector in enumerate(vectors)}
    position = [0] * len(vectors)
    for name, parameter in trainable(module):
        number = numbers[parameter.dtype]
        start, position[number] = position[number], position[number] + parameter.numel()
        yield Place(name=name, vector=number, start=start, stop=position[number]), parameter


def runs_of(places: Sequence[Place], took_part: Sequence[bool]) -> list[tuple[int, int, int]]:
    """(vector, start, stop) of the neighbours that took part."""
    runs: list[tuple[int, int, int]] = []
    newest: dict[int, int] = {}
    for place, took in zip(places, took_part, strict=True):
        if not took:
            newest.pop(place.vector, None)
        elif (at := newest.get(place.vector)) is not None:
            runs[at] = (place.vector, runs[at][1], place.stop)
        else:
            newest[place.vector] = len(runs)
            runs.append((place.vector, place.start, place.stop))
    return runs


_DECIDED = "what is trained is decided once, when trainer.model returns"


def _view(vector: torch.Tensor, place: Place, parameter: torch.Tensor) -> torch.Tensor:
    """The part of a vector that is this parameter, with its shape, and its strides where they leave no gaps."""
    return vector.as_strided(parameter.shape, _strides(parameter), place.start)


def _strides(parameter: torch.Tensor) -> tuple[int, ...]:
    # What empty_like makes: the same order of dimensions, dense and without overlaps.
    return torch.empty_like(parameter, device="meta").stride()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of one dimension, writable."""
    return tensor.detach().view(torch.uint8).numpy().data


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a layout, in its order. One without elements has nothing to train."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad and p.numel()]


_ONE_THREAD = 1 << 15
"""Elements of which torch divides no operation between threads: a norm over them is the same for any number of threads."""


def norm(parts: Sequence[torch.Tensor]) -> float:
    """The Euclidean norm over all elements of these tensors, on one device. Of 16-bit values it is computed with 32 bits."""
    pieces = [piece for tensor in parts if tensor.numel() for piece in _norm_pieces(tensor)]
    by_bits = [[piece for piece in pieces if (piece.itemsize == 2) is is_short] for is_short in (False, True)]
    norms = [
        one
        for some, dtype in zip(by_bits, (None, torch.float32), strict=True)
        if some
        for one in torch._foreach_norm(some, 2, dtype)  # one call, for there may be hundreds
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms).double())) if norms else 0.0


def _norm_pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    if tensor.is_cuda or tensor.numel() <= _ONE_THREAD:
        return (tensor,)
    return torch.split(tensor.reshape(-1), _ONE_THREAD)
