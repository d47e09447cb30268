"""The forward of a pipeline as a model to be called: for an evaluation, in which no process has all stages.

Every process of a pipeline calls it with the same arguments, as every rank runs the user's `evaluate`. What goes from stage to stage, and
the output, which each process gets, are tensors and plain values: a JSON text that says what lies where, and then the tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from disttrain.api.strategy import ModelParallel
from disttrain_trainer.parallel import stages

_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
Transfer = Callable[[torch.Tensor], object]
"""Sends the tensor, or fills it with what comes."""


class NeedsWholeModel(AttributeError):
    """The user's code asks of the model what its stages do not have together. Raised on every rank alike."""


class PipelineForward(nn.Module):
    """Calls the stages of a pipeline one after the other. Its modes are those of the stages that lie here."""

    def __init__(
        self, own: Mapping[int, nn.Module], *, cut: ModelParallel, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        """own: the stages of this process, by number."""
        super().__init__()
        self.stages = nn.ModuleList(own.values())
        self._numbers = tuple(own)
        self._count = stages.count(cut)
        self._size = cut.pipeline
        self._group = group
        self._device = device

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Raises NeedsWholeModel for an output that is neither a tensor nor a list, tuple or dict of them, and BrokenGroup's cause."""
        output: Any = None
        # What is drawn in a stage must not change what the user's code draws: that is the same on every rank.
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            for number, stage in zip(self._numbers, self.stages, strict=True):
                if number:
                    received = self._receive(number - 1)
                    output = stage(*received) if isinstance(received, tuple | list) else stage(received)
                else:
                    output = stage(*arguments, **keywords)
                if number < self._count - 1:
                    self._send(output, to=(number + 1) % self._size)
        last = (self._count - 1) % self._size

        def share(tensor: torch.Tensor) -> object:
            return dist.broadcast(tensor, group=self._group, group_src=last)

        if self._numbers[-1] == self._count - 1:
            self._give(output, share)
            return output
        return self._take(share)

    def _send(self, value: Any, *, to: int) -> None:
        self._give(value, lambda tensor: dist.send(tensor, group=self._group, group_dst=to))

    def _receive(self, number: int) -> Any:
        source = number % self._size
        return self._take(lambda tensor: dist.recv(tensor, group=self._group, group_src=source))

    def _give(self, value: Any, transfer: Transfer) -> None:
        tensors: list[torch.Tensor] = []
        unknown: list[str] = []
        text = json.dumps(_described(value, tensors, unknown)).encode()
        if unknown:
            text = json.dumps({"unknown": unknown[0]}).encode()
        transfer(torch.tensor([len(text)], device=self._device))
        transfer(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._device))
        if unknown:
            raise _unknown(unknown[0])
        for tensor in tensors:
            if tensor.numel():
                transfer(tensor.detach().contiguous())

    def _take(self, transfer: Transfer) -> Any:
        length = torch.zeros(1, dtype=torch.int64, device=self._device)
        transfer(length)
        text = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        transfer(text)
        described = json.loads(bytes(text.tolist()))
        if "unknown" in described:
            raise _unknown(described["unknown"])
        return self._made(described, transfer)

    def _made(self, described: dict[str, Any], transfer: Transfer) -> Any:
        match described:
            case {"tensor": [dtype, shape]}:
                tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=self._device)
                if tensor.numel():
                    transfer(tensor)
                return tensor
            case {"dict": items}:
                return {name: self._made(one, transfer) for name, one in items}
            case {"list": items}:
                return [self._made(one, transfer) for one in items]
            case {"tuple": items}:
                return tuple(self._made(one, transfer) for one in items)
        return described["value"]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """One of this process, of which code asks the device and the dtype. Who takes more gets NeedsWholeModel."""
        yield next(parameter for stage in self.stages for parameter in stage.parameters(recurse=True))
        raise _missing("parameters()")

    def named_parameters(self, *arguments: Any, **keywords: Any) -> Any:
        raise _missing("named_parameters()")

    def buffers(self, recurse: bool = True) -> Any:
        raise _missing("buffers()")

    def named_buffers(self, *arguments: Any, **keywords: Any) -> Any:
        raise _missing("named_buffers()")

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        raise _missing("state_dict()")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise _missing(name) from None


def _missing(what: str) -> NeedsWholeModel:
    return NeedsWholeModel(f"trainer.evaluate uses model.{what}, which the stages of a pipeline do not have together")


def _unknown(kind: str) -> NeedsWholeModel:
    return NeedsWholeModel(f"trainer.model returns a {kind}, which does not go from one process to another")


def _described(value: Any, tensors: list[torch.Tensor], unknown: list[str]) -> dict[str, Any]:
    match value:
        case torch.Tensor():
            tensors.append(value)
            return {"tensor": [str(value.dtype), list(value.shape)]}
        case dict() if type(value) is dict and all(isinstance(name, str) for name in value):
            return {"dict": [[name, _described(one, tensors, unknown)] for name, one in value.items()]}
        case list() if type(value) is list:
            return {"list": [_described(one, tensors, unknown) for one in value]}
        case tuple() if type(value) is tuple:
            return {"tuple": [_described(one, tensors, unknown) for one in value]}
        case None | bool() | int() | float() | str():
            return {"value": value}
    unknown.append(type(value).__name__)
    return {"value": None}
