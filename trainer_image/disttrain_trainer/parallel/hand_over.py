"""A state that one rank gives to others: named tensors, their forms first."""

import json
from collections.abc import Callable

import torch
import torch.distributed as dist

from disttrain_trainer.checkpoint.tensor_file import Named
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.parallel.backend import BrokenGroup


def hand_over(
    ours: Named,
    *,
    source: int,
    step: int,
    device: torch.device,
    in_place: Callable[[str], bool],
    group: dist.ProcessGroup | None = None,
) -> tuple[int, dict[str, torch.Tensor]]:
    """Gives every rank the tensors of the rank `source`, and its step. Every rank of the group must call it; blocks.

    ours: the tensors of this rank. in_place: whether one of this name may be received in the memory of our own. device: where the backend
    sends from. group: default the whole round. Returns the step, and what was received by name; nothing on the source itself. Raises
    BrokenGroup when a peer is lost, and WrongInput when the source has another model.
    """
    gives = dist.get_rank() == source
    # Bytes, and all on one device: not every backend sends every type, nor from every memory.
    views = {name: as_bytes(tensor).to(device) for name, tensor in ours.items()} if gives else {}
    text = json.dumps([(name, _name_of(t.dtype), tuple(t.shape)) for name, t in ours.items()]) if gives else ""
    head = torch.tensor([step, len(text)], device=device)
    _send(head, source, group)
    step, length = (int(value) for value in head.tolist())
    written = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device) if gives else None
    written = written if written is not None else torch.empty(length, dtype=torch.uint8, device=device)
    _send(written, source, group)
    described = json.loads(bytes(written.tolist()))
    values: dict[str, torch.Tensor] = {}
    for name, dtype, shape in described:
        if gives:
            _send(views.pop(name), source, group)
            continue
        # Into the tensor's own memory where it has the same form.
        tensor, kind = ours.get(name), getattr(torch, dtype)
        if (
            tensor is None
            or not (in_place(name) and tensor.is_contiguous() and tensor.device.type == device.type)
            or tensor.shape != tuple(shape)
        ):
            tensor = torch.empty(tuple(shape), dtype=kind, device=device)
        if tensor.dtype != kind:
            raise WrongInput(f"worker-{source} has another model: {name} is {kind} there, {tensor.dtype} here")
        _send(as_bytes(tensor), source, group)
        values[name] = tensor
    return step, values


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor of any dtype, as uint8 of shape (bytes,); its own memory when it is contiguous."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _send(tensor: torch.Tensor, source: int, group: dist.ProcessGroup | None) -> None:
    """Gives every rank the tensor of `source`. Raises BrokenGroup when a peer is lost."""
    if not tensor.numel():
        return
    try:
        dist.broadcast(tensor, source, group=group)
    except RuntimeError as error:
        raise BrokenGroup(error) from None
