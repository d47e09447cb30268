"""Files of a checkpoint: written whole or not at all, with their digest, and readable by plain safetensors."""

import errno
import fcntl
import hashlib
import os
import random
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import nn

from disttrain.api import digests
from disttrain.api.names import MODEL_FILE
from disttrain_trainer.checkpoint import atomic, model_file, tensor_file
from disttrain_trainer.checkpoint.background import HostCopy
from disttrain_trainer.errors import WrongInput


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(sink: atomic.Sink) -> None:
        sink.write(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic.write(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 1, 4096, 1 << 20, (3 << 20) + 5])
def test_a_file_of_any_size_is_what_was_written_however_it_was_cut(tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)

    def fill(sink: atomic.Sink) -> None:
        sink.write(content[:5])
        sink.write(memoryview(content)[5:])

    digest = atomic.write(tmp_path / "file", fill)
    assert (tmp_path / "file").read_bytes() == content
    assert digest == digests.of(tmp_path / "file", like=digest)


def test_a_file_system_that_cannot_write_past_the_page_cache_gets_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, refused = os.write, list[int]()

    def as_some_do(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", as_some_do)
    atomic.write(tmp_path / "file", lambda sink: sink.write(bytes(3 << 20)))
    assert len(refused) == 1
    assert (tmp_path / "file").read_bytes() == bytes(3 << 20)


def test_tensors_of_every_kind_are_read_by_plain_safetensors_and_have_their_digest(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a flag": torch.tensor([True, False, True]),
        "odd": torch.arange(3, dtype=torch.uint8),
        "transposed": wide.t(),
        "again": wide,
        "expanded": torch.ones(1, 2).expand(5, 2),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "none": torch.empty(0, 3),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "double": torch.rand(3, dtype=torch.float64),
        "complex": torch.rand(3, dtype=torch.complex64).conj(),
    }
    path = tmp_path / "file"
    digest = tensor_file.write(path, tensors, {"format": "pt"})
    assert digest == f"xxh3_128:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"
    for found in (load_file(path), tensor_file.read(path)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


def test_a_copy_is_written_from_where_it_lies_to_the_same_file(tmp_path: Path) -> None:
    tensors = {
        "large": torch.rand(3 << 18),
        "odd": torch.arange(5, dtype=torch.int16),
        "transposed": torch.rand(600, 1000).t(),
        "none": torch.empty(0, 3),
        "wide": torch.rand(7, dtype=torch.complex128).real,
    }
    digest = tensor_file.write(tmp_path / "one", tensors)
    assert tensor_file.write(tmp_path / "two", HostCopy().take(tensors)) == digest
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensor_file.write(path, {"a": torch.rand(100)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WrongInput, match="file cannot be read"):
        tensor_file.read(path)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_a_model_is_loaded_by_plain_safetensors_with_its_buffers_and_tied_weights(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    model.norm.running_mean.fill_(3)
    (tmp_path / f".{MODEL_FILE}.aa.tmp").write_text("of a writer that was killed")
    written = model_file.write(model_file.state_of(model), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MODEL_FILE]
    assert written.sha256 == hashlib.sha256(Path(written.path).read_bytes()).hexdigest()
    found = load_file(written.path)
    assert {"embed.weight", "head.weight", "norm.running_mean"} < found.keys()
    other.load_state_dict(found, strict=True)
    assert torch.equal(other.norm.running_mean, model.norm.running_mean)
    assert torch.equal(other.head.weight, model.embed.weight)


def test_a_model_that_the_format_cannot_hold_is_said_and_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("words", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged))
    assert model_file.place_of(model, tmp_path) is None
    assert "no model.safetensors is written at the end: trainer.model: buffer words is nested" in caplog.text


def test_a_buffer_that_the_format_cannot_hold_is_left_out_of_the_model_file_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("graph", torch.eye(3).to_sparse())
    assert model_file.place_of(model, tmp_path) == tmp_path
    assert "will not have buffer graph, which safetensors cannot hold: load it with strict=False" in caplog.text
    model_file.write(model_file.state_of(model), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"weight", "bias"}
