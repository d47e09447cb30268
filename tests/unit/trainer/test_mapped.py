"""A factory's large tensors come from files: the same bits, little memory, nothing left behind."""

from pathlib import Path

import pytest
import torch
from torch import nn

from disttrain_trainer.model.mapped import SMALL, LargeInFiles
from disttrain_trainer.runtime.machine import memory

WIDTH = 1024


class Model(nn.Module):
    """Parameters of most of the ways in which they are made: 4 MiB each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.words = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Embedding(WIDTH, WIDTH)
        self.last.weight = self.first.weight
        self.drawn = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.short = nn.Parameter(torch.ones(WIDTH, 2 * WIDTH, dtype=torch.bfloat16))
        self.computed = nn.Parameter(torch.arange(WIDTH * WIDTH).view(WIDTH, WIDTH) * 0.5)
        self.register_buffer("mask", torch.zeros(WIDTH, WIDTH, dtype=torch.int32))


def made() -> Model:
    torch.manual_seed(3)
    return Model()


def anonymous() -> int:
    """Bytes of this process's memory that are in no file."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) << 10


def test_a_model_out_of_files_has_the_same_bits_and_leaves_the_generator_where_it_was(tmp_path: Path) -> None:
    with LargeInFiles(after=0, folder=str(tmp_path)) as files:
        model = made()
    drawn = torch.rand(3)
    expected = made()
    assert torch.equal(torch.rand(3), drawn)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    assert model.last.weight is model.first.weight
    in_files = {name for name, value in state.items() if value.untyped_storage().filename is not None}
    assert in_files == {"first.weight", "last.weight", "words.weight", "drawn", "short", "mask"}
    assert files.nbytes >= 5 * (4 << 20)
    assert list(tmp_path.iterdir()) == []


def test_its_gradients_are_the_same(tmp_path: Path) -> None:
    with LargeInFiles(after=0, folder=str(tmp_path)):
        model = made()
    inputs = torch.randn(2, WIDTH)
    for one in (model, expected := made()):
        one.last(one.first(inputs).tanh()).sum().backward()
    assert torch.equal(model.first.weight.grad, expected.first.weight.grad)


def test_files_take_the_place_of_memory(tmp_path: Path) -> None:
    with torch.random.fork_rng(), LargeInFiles(after=0, folder=str(tmp_path)) as files:
        before = anonymous()
        kept = [nn.Linear(2048, 2048, bias=False) for _ in range(8)]
        taken = anonymous() - before
    assert files.nbytes == len(kept) * (16 << 20)
    assert taken < 32 << 20


def test_the_first_bytes_and_small_tensors_stay_in_memory(tmp_path: Path) -> None:
    with LargeInFiles(after=2 * SMALL, folder=str(tmp_path)) as files:
        first, second, third = (torch.empty(SMALL, dtype=torch.uint8) for _ in range(3))
        small = torch.zeros(SMALL - 1, dtype=torch.uint8)
    names = [tensor.untyped_storage().filename for tensor in (first, second, third, small)]
    assert [name is not None for name in names] == [False, False, True, False]
    assert files.nbytes == SMALL


def test_where_the_disk_gives_no_file_the_model_stays_in_memory(tmp_path: Path) -> None:
    with LargeInFiles(after=0, folder=str(tmp_path / "nowhere")) as files:
        model = made()
    assert files.nbytes == 0
    assert all(value.untyped_storage().filename is None for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("file", "text", "limit"),
    [
        ("memory.max", "1048576", 1 << 20),
        ("memory/memory.limit_in_bytes", "2097152", 2 << 20),
        ("memory.max", "max", None),
    ],
)
def test_the_memory_is_the_containers_limit(tmp_path: Path, file: str, text: str, limit: int | None) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text + "\n")
    assert memory(tmp_path) == (limit or memory(tmp_path / "nowhere"))
