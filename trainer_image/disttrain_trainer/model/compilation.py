"""trainer.compile: torch.compile for the blocks of a model, where there is what it needs."""

import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from disttrain_trainer.model.activations import Recomputed
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

_COMPILERS = ("c++", "g++", "clang++")


def why_not() -> str | None:
    """What torch.compile lacks here for code of the CPU, which it also needs beside a GPU; None where it has all."""
    if not any(map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))):
        return f"there is no C++ compiler (CXX, {', '.join(_COMPILERS)})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the headers of Python are not installed (Python.h)"
    return None


def compile_blocks(blocks: Sequence[nn.Module], *, backend: str = "inductor") -> None:
    """Changes forward() of each block in place, also within activation checkpointing; names, hooks and type stay. Each is compiled when it
    is called for the first time, and for other shapes again.

    Compiled code draws what the block itself would draw: dropout stays a function of the job's seed.
    """
    if backend == "inductor":
        from torch._inductor import config  # takes seconds: only for who uses it

        config.fallback_random = True
    for block in blocks:
        forward = block.forward
        if isinstance(forward, Recomputed):
            forward.inner = torch.compile(forward.inner, backend=backend)
        else:
            block.forward = torch.compile(forward, backend=backend)
