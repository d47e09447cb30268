"""Tensors that safetensors cannot hold are kept as dense parts, and come back as they were."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from disttrain_trainer.checkpoint import composite, tensor_file, tensors
from disttrain_trainer.errors import WrongInput

DENSE = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 3.0, 0.0]], dtype=torch.float64)
FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "coo": torch.Tensor.to_sparse,
    "uncoalesced": lambda dense: torch.sparse_coo_tensor(
        torch.tensor([[0, 0], [1, 1]]), torch.tensor([1.0, 2.0]), dense.shape, check_invariants=True
    ),
    "hybrid": lambda dense: dense.to_sparse(1),
    "empty": lambda dense: (dense * 0).to_sparse(),
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
    "bsr": lambda dense: dense.to_sparse_bsr((1, 2)),
    "bsc": lambda dense: dense.to_sparse_bsc((1, 2)),
    "complex128": lambda dense: torch.complex(dense, -dense),
    "conjugate": lambda dense: torch.complex(dense, -dense).conj(),
    "sparse complex128": lambda dense: torch.complex(dense, -dense).to_sparse(),
}


def module_with(buffer: torch.Tensor | None) -> nn.Module:
    module = nn.Linear(2, 2)
    module.body = nn.Module()
    module.body.register_buffer("adjacency", buffer)
    return module


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support")
@pytest.mark.parametrize("form", FORMS)
def test_a_buffer_comes_back_from_a_file_with_its_layout_and_type(form: str, tmp_path: Path) -> None:
    tensor = FORMS[form](DENSE)
    source, target = module_with(tensor), module_with(None)
    tensors.check_buffers(source)
    path = tmp_path / "buffers.safetensors"
    tensor_file.write(path, tensors.buffers_of(source))
    tensors.put_buffers(target, tensor_file.read(path), source="the file")
    found = target.body.adjacency
    assert (found.layout, found.dtype, found.shape) == (tensor.layout, tensor.dtype, tensor.shape)
    assert torch.equal(found.to_dense(), tensor.to_dense())


def test_a_sparse_buffer_that_has_grown_takes_the_place_of_a_smaller_one() -> None:
    source, target = module_with(torch.eye(4).to_sparse()), module_with(torch.zeros(4, 4).to_sparse())
    tensors.put_buffers(target, tensors.buffers_of(source), source="worker-0")
    assert torch.equal(target.body.adjacency.to_dense(), torch.eye(4))


def test_parts_that_make_no_tensor_are_refused_and_not_read() -> None:
    values = tensors.buffers_of(module_with(DENSE.to_sparse()))
    values["body.adjacency::sparse_coo.indices"][0, 0] = 7
    with pytest.raises(
        WrongInput, match="the file is damaged: the parts of a sparse tensor there make none: size is incons"
    ):
        tensors.put_buffers(module_with(None), values, source="the file")


def test_a_tensor_that_a_file_can_hold_is_no_parts() -> None:
    assert composite.parts_of("weight", DENSE) == {"weight": DENSE}
    assert composite.whole({"weight": DENSE}) == {"weight": DENSE}


def test_a_part_that_is_missing_is_another_model() -> None:
    values = tensors.buffers_of(module_with(DENSE.to_sparse()))
    del values["body.adjacency::sparse_coo.indices"]
    with pytest.raises(WrongInput, match="the file is of another model: a tensor there lacks its part 'indices'"):
        tensors.put_buffers(module_with(None), values, source="the file")
