"""Tensors that safetensors cannot hold, as dense parts of their own names: sparse ones, and complex ones of double precision.

    adjacency::sparse_coo.indices   int64, (dimensions, elements)
    adjacency::sparse_coo.values    (elements, ...)
    adjacency::size                 int64, (dimensions,)

    phases::complex128              float64, (..., 2), as torch.view_as_real

They are stored, sent and counted as any other tensors; only who reads a module's buffers or sets them knows of it (tensors.py).
"""

from collections.abc import Callable, Mapping

import torch

from disttrain.api.tensor_index import PART

_COMPLEX = "complex128"
_SIZE = "size"
_COMPRESSED: Mapping[torch.layout, tuple[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]] = {
    torch.sparse_csr: ("sparse_csr", lambda t: (t.crow_indices(), t.col_indices())),
    torch.sparse_csc: ("sparse_csc", lambda t: (t.ccol_indices(), t.row_indices())),
    torch.sparse_bsr: ("sparse_bsr", lambda t: (t.crow_indices(), t.col_indices())),
    torch.sparse_bsc: ("sparse_bsc", lambda t: (t.ccol_indices(), t.row_indices())),
}
_LAYOUTS = {name: layout for layout, (name, _) in _COMPRESSED.items()}


def parts_of(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensor by its name; or, where safetensors cannot hold it, its parts by theirs. A tensor of another kind is returned as it is.

    Parts share memory with the tensor, except those of an uncoalesced sparse one.
    """
    if tensor.dtype == torch.complex128 and tensor.layout is torch.strided:
        return {f"{name}{PART}{_COMPLEX}": torch.view_as_real(tensor.resolve_conj())}
    if tensor.layout is torch.sparse_coo:
        tensor, kind = tensor.coalesce(), "sparse_coo"
        parts = {f"{name}{PART}{kind}.indices": tensor.indices()}
    elif tensor.layout in _COMPRESSED:
        kind, indices = _COMPRESSED[tensor.layout]
        compressed, plain = indices(tensor)
        parts = {f"{name}{PART}{kind}.compressed": compressed, f"{name}{PART}{kind}.plain": plain}
    else:
        return {name: tensor}
    size = torch.tensor(tuple(tensor.shape), dtype=torch.int64)
    return parts | parts_of(f"{name}{PART}{kind}.values", tensor.values()) | {f"{name}{PART}{_SIZE}": size}


def whole(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of which these are the parts, and those that have none as they are. Raises KeyError when a part is missing, and
    RuntimeError when the parts make no tensor: torch would read memory that is not the tensor's."""
    found: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in values.items():
        owner, mark, part = name.partition(PART)
        if mark:
            parts.setdefault(owner, {})[part] = value
        else:
            found[owner] = value
    return found | {name: _joined(of_one) for name, of_one in parts.items()}


def is_part(name: str) -> bool:
    """Whether this is the name of a part."""
    return PART in name


def owner_of(name: str) -> str:
    """The name of the tensor of which this is a part, or that this is."""
    return name.partition(PART)[0]


def _joined(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    if _COMPLEX in parts:
        # A copy: torch reads such numbers 16 bytes at a time, and in a file's memory they lie at multiples of 8.
        return torch.view_as_complex(parts[_COMPLEX].clone(memory_format=torch.contiguous_format))
    size = tuple(parts[_SIZE].tolist())
    kind = next(name.partition(".")[0] for name in parts if name != _SIZE)
    # The values of a sparse tensor may have parts themselves.
    values = whole({name.removeprefix(f"{kind}."): value for name, value in parts.items() if name != _SIZE})
    if kind == "sparse_coo":
        return torch.sparse_coo_tensor(
            values["indices"], values["values"], size, is_coalesced=True, check_invariants=True
        )
    return torch.sparse_compressed_tensor(
        values["compressed"], values["plain"], values["values"], size, layout=_LAYOUTS[kind], check_invariants=True
    )
