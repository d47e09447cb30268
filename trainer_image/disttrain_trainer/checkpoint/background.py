"""Checkpoints that are written beside the training: from a copy, by a thread of their own, so that the next step begins with the copy made.

A process writes one checkpoint at a time. One that is due while another is being written waits for it: so a fault costs at most the
interval that is being saved and the one that runs, and memory holds at most one copy of the state.
"""

import threading
from collections.abc import Callable

import torch

from disttrain_trainer.checkpoint.tensor_file import Named
from disttrain_trainer.runtime import machine


class HostCopy:
    """The host's memory that holds the copy of named tensors; it is used again for the next one, and stays until the process ends."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, tensors: Named) -> dict[str, torch.Tensor]:
        """Copies of the tensors by name, dense, of the same shapes and dtypes, in the host's memory; blocks until all are made.

        They are valid until the next call, which uses their memory again: when it is made, no thread may read them any more. A GPU copies
        into pinned memory. For one thread at a time.
        """
        self._held = {name: self._memory_for(name, tensor) for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._held[name].copy_(tensor, non_blocking=tensor.is_cuda)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._held)

    def _memory_for(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        held = self._held.get(name)
        if held is not None and (held.shape, held.dtype) == (tensor.shape, tensor.dtype):
            return held
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


class BackgroundWriter:
    """Does one piece of work at a time in a thread of low priority, which takes the processor mostly from what waits.

    The owner's thread calls `start` and `check`; any thread may call `wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether the work is not done yet."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], object]) -> None:
        """Does this work, when the work before it is done: waits for that one. Raises what that one failed with."""
        self.wait()
        self.check()

        def run() -> None:
            machine.lower_priority()
            try:
                work()
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Blocks until the work is done."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def check(self) -> None:
        """Raises the exception that the work failed with, once; does not block."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
