"""Memory for vectors that stay: parameters, gradients and optimiser state.

In huge pages, where the kernel gives them when asked (Ubuntu's and many clouds' "madvise"). Every byte of such a vector goes through
a socket or an optimiser in each step, and with pages of 4 KiB a good part of that time is looking up pages: a synchronous step of
32 MiB takes 0.85 of the time with huge ones. Not for what comes and goes: the kernel clears 2 MiB for each of them, and searches for it.
"""

import contextlib
import mmap

import torch

HUGE_PAGE = 2 << 20
"""Bytes, on x86-64 and on arm64 with pages of 4 KiB. Below that, a vector comes from torch's allocator."""


def zeros(length: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """A vector of zeros, as torch.zeros makes it; on a CPU in huge pages when it fills one."""
    nbytes = length * dtype.itemsize
    if nbytes < HUGE_PAGE or (device is not None and device.type != "cpu"):
        return torch.zeros(length, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
