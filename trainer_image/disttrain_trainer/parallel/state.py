"""The state of a model and its optimiser as named tensors: to be saved, loaded, and sent to the other ranks.

safetensors and JSON, never pickle: a checkpoint, or a peer, cannot bring code. Not here: when this happens (data.py), folders (checkpoint/).
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from disttrain_trainer.errors import WrongInput

FILE = "state.safetensors"

Tensors = dict[str, torch.Tensor]


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Parameters, buffers and optimiser state, each once, by name; the tensors themselves, not copies."""
    found: Tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    found |= {f"model.{name}": buffer for name, buffer in model.named_buffers()}
    for index, parameter in enumerate(_trained(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"optimizer.{index}.{name}"] = value
    return found


def adopt(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Takes over these values. Raises WrongInput when they are of another model."""
    own = tensors_of(model, optimizer)
    trained = _trained(optimizer)
    with torch.no_grad():
        for name in own:
            if name not in tensors and name.startswith("model."):
                raise WrongInput(f"the saved state has no {name.removeprefix('model.')!r}; it is of another model")
        for name, value in tensors.items():
            target = own.get(name)
            if target is not None and target.shape == value.shape:
                target.copy_(value)
            elif name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                parameter = trained[int(index)]
                # The count of steps may lie on the CPU (Adam), all else beside its parameter.
                device = parameter.device if value.dim() or optimizer.defaults.get("fused") else value.device
                optimizer.state[parameter][key] = value.to(device).clone()
            else:
                raise WrongInput(f"the saved state has {name!r} of shape {tuple(value.shape)}; it is of another model")


def all_finite(model: nn.Module) -> bool:
    """Whether no parameter is NaN or infinite."""
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.is_floating_point())


def save(path: Path, tensors: Tensors, *, step: int) -> None:
    """Writes a file. Raises OSError."""
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"step": str(step)})
    except SafetensorError as error:  # it wraps what the file system said
        raise OSError(str(error)) from None


def load(path: Path) -> Tensors:
    """The tensors of a file. Raises WrongInput when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise WrongInput(f"{path}: {error}") from None


def broadcast(model: nn.Module, optimizer: torch.optim.Optimizer, *, source: int, device: torch.device) -> None:
    """Gives every rank the state of `source`: first what there is, as JSON, then each tensor."""
    own = tensors_of(model, optimizer)
    is_source = dist.get_rank() == source
    described = [[name, list(value.shape), str(value.dtype)] for name, value in own.items()] if is_source else None
    shapes = _broadcast_json(described, source=source, device=device)
    received: Tensors = {}
    for name, shape, dtype in shapes:
        value = own[name] if is_source else torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        value = value.to(device).contiguous()
        dist.broadcast(value, source)
        received[name] = value
    if not is_source:
        adopt(model, optimizer, received)


def _broadcast_json(value: Any, *, source: int, device: torch.device) -> Any:
    """JSON and not an object collective: those unpickle what they receive."""
    data = json.dumps(value).encode()
    length = torch.tensor([len(data)], device=device)
    dist.broadcast(length, source)
    buffer = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    if dist.get_rank() == source:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, source)
    return json.loads(bytes(buffer.cpu().tolist()))


def _trained(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
