"""The state of a module as named tensors: which buffers are state, what a checkpoint can hold, and how saved values are taken over.

The buffers that are state are those that `state_dict()` has: not what was registered with persistent=False. Their shapes are those of now:
a module may let a buffer grow, put another tensor in its place, or register one late. A process that takes buffers over takes their
shapes, too.
"""

import torch
from torch import nn

from disttrain_trainer.checkpoint import composite, extra_state, tensor_file
from disttrain_trainer.checkpoint.tensor_file import Named
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

_BLOCK = 1 << 20
"""Elements that are looked at at a time."""


def take_over(present: Named, values: Named, *, source: str) -> None:
    """Copies the values into the tensors of these names, in place. Raises WrongInput when one is missing, or of another shape or dtype.

    source: whose values they are, for messages.
    """
    for name, ours in present.items():
        theirs = values.get(name)
        if theirs is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise another_model(source, name, theirs, ours)
    with torch.no_grad():
        for name, ours in present.items():
            ours.copy_(values[name])


def another_model(source: str, name: str, theirs: torch.Tensor | None, ours: torch.Tensor | None) -> WrongInput:
    """What is said when a state is of another model."""
    shapes = ["missing" if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (theirs, ours)]
    return WrongInput(f"trainer.model: {source} is of another model: {name} is {shapes[0]} there, {shapes[1]} here")


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are state, by name; one of two names under both. Parts stand for one that no file can hold (composite.py)."""
    found: dict[str, torch.Tensor] = {}
    for prefix, owner in _modules(module):
        for leaf, buffer in own_buffers(owner).items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                found |= composite.parts_of(prefix + leaf, buffer.detach())
        found |= extra_state.of(owner, prefix)
    return found


def own_buffers(owner: nn.Module) -> dict[str, torch.Tensor | None]:
    """Those of a module itself, by their last names: a module of TorchScript has no dict of them."""
    return dict(owner._buffers.items())


def may_have_buffers(module: nn.Module) -> bool:
    """Whether the module has buffers that are state, or will: one that is None may become a tensor."""
    return any(
        extra_state.there_is(owner) or any(leaf not in owner._non_persistent_buffers_set for leaf in own_buffers(owner))
        for _, owner in _modules(module)
    )


def put_buffers(module: nn.Module, values: Named, *, source: str) -> None:
    """Takes over these buffers, shapes included. Raises WrongInput when the module has no place for one.

    One that the values lack keeps its value. One that is no state here is left as it is: older releases saved those, too.
    """
    missing = buffers_of(module).keys() - values.keys()
    try:
        values = composite.whole(values)
    except KeyError as error:
        raise WrongInput(
            f"trainer.model: {source} is of another model: a tensor there lacks its part {error}"
        ) from None
    except RuntimeError as error:
        raise WrongInput(f"{source} is damaged: the parts of a sparse tensor there make none: {error}") from None
    if missing:
        log.warning("%s has no value of buffer %s, which stays as it is", source, ", ".join(sorted(missing)))
    owners = dict(_modules(module))
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    replaced: dict[int, torch.Tensor] = {}  # by what was there: a buffer of two names stays one
    for name, value in values.items():
        module_name = extra_state.module_of(name)
        if module_name is not None and module_name in owners and extra_state.there_is(owners[module_name]):
            extra_state.put(owners[module_name], name, value)
            continue
        prefix, dot, leaf = name.rpartition(".")
        owner = owners.get(prefix + dot)
        if owner is None or leaf in owner._parameters:
            raise another_model(source, name, value, None)
        if leaf in owner._non_persistent_buffers_set:
            continue
        ours = own_buffers(owner).get(leaf)
        if ours is not None and _fits(ours, value):
            with torch.no_grad():
                ours.copy_(value)
        elif ours is not None and id(ours) in replaced:
            owner._buffers[leaf] = replaced[id(ours)]
        else:
            new = value.to(device if ours is None else ours.device, copy=True)
            if ours is not None:
                replaced[id(ours)] = new
            if leaf in owner._buffers:
                owner._buffers[leaf] = new
            elif hasattr(owner, leaf):
                raise another_model(source, name, value, None)
            else:
                owner.register_buffer(leaf, new)


def copy_buffers(module: nn.Module, other: nn.Module) -> None:
    """Gives the module all buffers of another one of the same kind, those that are no state included."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    theirs = dict(_modules(other))
    moved: dict[int, torch.Tensor] = {}
    for prefix, owner in _modules(module):
        if (source := theirs.get(prefix)) is None:
            continue
        for leaf, buffer in source._buffers.items():
            if leaf in owner._buffers:
                owner._buffers[leaf] = None if buffer is None else moved.setdefault(id(buffer), buffer.to(device))
        for name, value in extra_state.of(source, prefix).items():
            extra_state.put(owner, name, value)


def frozen_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not trained, by name: those without a gradient or without elements."""
    return {name: p for name, p in module.named_parameters() if not (p.requires_grad and p.numel())}


def put_frozen(frozen: dict[str, nn.Parameter], values: Named, *, source: str) -> None:
    """Takes over the values of frozen parameters, in place. One that the values lack keeps its own. Raises WrongInput for another shape."""
    with torch.no_grad():
        for name in frozen.keys() & values.keys():
            if not _fits(frozen[name], values[name]):
                raise another_model(source, name, values[name], frozen[name])
            frozen[name].copy_(values[name])


def check_parameters(named: Named) -> None:
    """Raises WrongInput, which names it, for a parameter that neither a checkpoint nor another worker can be given: a frozen one."""
    for name, parameter in named.items():
        if problem := _problem(parameter):
            raise WrongInput(
                f"trainer.model: parameter {name} is {problem}: keep it dense and of a common type, or as a buffer with persistent=False"
            )


def check_buffers(module: nn.Module) -> None:
    """Raises WrongInput, which names it, for a buffer that neither a checkpoint nor another worker can be given."""
    for name, buffer in buffers_of(module).items():
        if problem := _problem(buffer):
            raise WrongInput(
                f"trainer.model: buffer {name} is {problem}: keep it dense and of a common type, or make it again in the factory and "
                "register it with persistent=False"
            )


def check_extra_state(module: nn.Module) -> None:
    """Raises WrongInput, which names the module, for extra state that is neither a tensor nor JSON."""
    for prefix, owner in _modules(module):
        extra_state.check(owner, prefix)


def _modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module, with the prefix of its buffers' names; one of two names under both."""
    return [(f"{name}." if name else "", m) for name, m in module.named_modules(remove_duplicate=False)]


def can_be_saved(tensor: torch.Tensor) -> bool:
    """Whether a checkpoint can hold the tensor: it is dense, not quantized, and of a dtype that safetensors has."""
    return not _problem(tensor)


def _problem(tensor: torch.Tensor) -> str:
    """Why a tensor can be neither saved nor sent; "" when it can."""
    if tensor.is_quantized:
        what = "quantized"
    elif tensor.is_nested:
        what = "nested"
    elif tensor.layout is not torch.strided:
        what = f"sparse ({tensor.layout})"
    elif not tensor_file.can_hold(tensor.dtype):
        what = f"of type {tensor.dtype}"
    else:
        return ""
    return f"{what}, which a checkpoint cannot hold and other workers cannot be given"


def is_finite(vector: torch.Tensor) -> bool:
    """Whether no element of a one-dimensional tensor is NaN or infinite."""
    wide = torch.float32 if vector.dtype.itemsize < 4 else vector.dtype
    # A finite sum has only finite terms, and takes a tenth of the time; one that is not finite may only have overflowed.
    return all(
        bool(block.sum(dtype=wide).isfinite()) or bool(block.isfinite().all()) for block in torch.split(vector, _BLOCK)
    )


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor: nothing can be copied into it."""
    return any(not stride and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _fits(ours: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the value can be copied into this memory. A sparse tensor has none of a fixed size."""
    return (
        ours.layout is torch.strided
        and (ours.shape, ours.dtype, ours.layout) == (value.shape, value.dtype, value.layout)
        and not overlaps(ours)
    )
