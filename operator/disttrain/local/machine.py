"""What this machine has for a job: GPUs, and Python packages. Not here: what a process gets of them (programs.py)."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path


def gpus() -> list[str]:
    """The GPUs that we may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        # As CUDA reads it: the first entry that names no GPU, such as -1, hides all that come after it.
        return list(takewhile(_names_a_gpu, (name.strip() for name in visible.split(","))))
    # CUDA counts the GPUs that it is given. The numbers of the device files may have gaps, as in a container that has GPUs 2 and 5.
    return [str(number) for number in range(sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*")))]


def _names_a_gpu(name: str) -> bool:
    return name.isdigit() or name.startswith(("GPU-", "MIG-"))


def importable(package: str, code: Sequence[str] = ()) -> bool:
    """Whether a process in the current folder would find a top-level module, by whatever finder. Imports nothing.

    code: entries of the module path that stand before the current folder.
    """
    before = sys.path[:]
    sys.path[:0] = [*code, str(Path.cwd())]
    importlib.invalidate_caches()
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: a module that was loaded without a spec, such as __main__
        return False
    finally:
        sys.path[:] = before
