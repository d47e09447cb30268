"""Vectors that stay lie in huge pages, and are otherwise those of torch."""

import mmap
from pathlib import Path

import pytest
import torch

from disttrain_trainer.runtime import memory
from disttrain_trainer.runtime.memory import HUGE_PAGE, zeros


def flags(tensor: torch.Tensor) -> list[str]:
    """The flags of the mapping in which the tensor lies."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            start, _, stop = line.split(" ", 1)[0].partition("-")
            inside = int(start, 16) <= tensor.data_ptr() < int(stop, 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("it lies nowhere")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nbytes", [0, 64, HUGE_PAGE - 8, HUGE_PAGE, HUGE_PAGE + 8, 3 * HUGE_PAGE])
def test_a_vector_is_one_of_zeros_to_write_to(dtype: torch.dtype, nbytes: int) -> None:
    vector = zeros(nbytes // dtype.itemsize, dtype)
    assert torch.equal(vector, torch.zeros(nbytes // dtype.itemsize, dtype=dtype))
    vector.add_(1)
    assert torch.equal(vector, torch.ones_like(vector))


def test_a_large_vector_asks_for_huge_pages_and_a_small_one_does_not() -> None:
    large, small = zeros(HUGE_PAGE, torch.float32), zeros(100, torch.float32)
    assert "hg" in flags(large) or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert "hg" not in flags(small)


def test_a_vector_that_is_gone_leaves_no_memory_behind() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    for _ in range(20):
        zeros(16 * HUGE_PAGE, torch.uint8).fill_(1)
    assert resident() - before < 16 * HUGE_PAGE


def test_a_kernel_without_huge_pages_gives_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    assert torch.equal(zeros(HUGE_PAGE, torch.float32), torch.zeros(HUGE_PAGE))


def test_a_vector_of_an_accelerator_is_torchs() -> None:
    assert zeros(HUGE_PAGE, torch.float32, torch.device("meta")).device.type == "meta"
