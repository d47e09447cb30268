"""The whole model in files, where every process makes it and keeps a part of it.

The first parameters are those of one process, whoever computes what: so each process calls the factory for the whole model, also where the
model is cut over the workers and larger than the memory of one. While the factory runs, large tensors that it makes come from files
then: to the kernel they are a cache, which it writes out and reads again when memory is short. The operations are the same, and so are the
bits. What a process keeps is copied into its memory (parallel/compose.py), and the files are gone with the tensors in them.
"""

import os
import tempfile
from math import prod
from types import TracebackType
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

SMALL: Final = 1 << 20
"""Bytes below which a tensor is not worth a file."""
_EMPTY: Final = torch.ops.aten.empty.memory_format


class LargeInFiles(TorchDispatchMode):
    """Within it, tensors that are made on the CPU come from files without a name, once this thread has made some bytes of them.

    Those that torch makes from nothing (empty, zeros, randn, ...), which nearly all parameters are; what is computed from others is not.
    """

    def __init__(self, *, after: int, folder: str | None = None) -> None:
        """after: bytes of large tensors in memory, before the first one in a file. folder: default: that of temporary files."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = after
        self._folder = folder or tempfile.gettempdir()
        self.nbytes = 0
        """Of the tensors in files."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if not self._takes(options) or any(isinstance(argument, torch.Tensor) for argument in args):
            return func(*args, **options)
        if func is _EMPTY:
            found = self._mapped(tuple(args[0]), options.get("dtype") or torch.get_default_dtype())
            return func(*args, **options) if found is None else found
        made = func(*args, **options)
        if type(made) is not torch.Tensor or made.device.type != "cpu" or not made.is_contiguous():
            return made
        found = self._mapped(tuple(made.shape), made.dtype)
        return made if found is None else found.copy_(made)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)  # type: ignore[no-untyped-call]
        if self.nbytes:
            log.info("%.0f MiB of the whole model lie in files in %s", self.nbytes / (1 << 20), self._folder)

    def _takes(self, options: dict[str, Any]) -> bool:
        device = options.get("device")
        return (
            (device is None or torch.device(device).type == "cpu")
            and not options.get("pin_memory")
            and options.get("layout") in (None, torch.strided)
            and options.get("memory_format") in (None, torch.contiguous_format)
        )

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor in a file; None for a small one, one of the first, and where the disk has no room."""
        elements = prod(shape)
        nbytes = elements * dtype.itemsize
        if nbytes < SMALL:
            return None
        if self._left >= nbytes:
            self._left -= nbytes
            return None
        try:
            file, name = tempfile.mkstemp(prefix="disttrain-model-", dir=self._folder)
            try:
                os.posix_fallocate(file, 0, nbytes)  # else a full disk is a SIGBUS at the first write
                found = torch.from_file(name, shared=True, size=elements, dtype=dtype)
            finally:
                os.close(file)
                os.unlink(name)
        except (OSError, RuntimeError) as error:
            log.warning("the whole model stays in memory: no file of %d bytes in %s (%s)", nbytes, self._folder, error)
            self._left = 1 << 62
            return None
        self.nbytes += nbytes
        return found.view(shape)
