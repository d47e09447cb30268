"""Checkpoints that are written beside the training: from a copy, by a thread of their own, so that the next step begins with the copy made.

A process writes one checkpoint at a time. One that is due while another is being written waits for it: so a fault costs at most the
interval that is being saved and the one that runs, and memory holds at most one copy of the state.
"""

import threading
from collections.abc import Callable

import torch

from disttrain_trainer.checkpoint import tensor_file
from disttrain_trainer.checkpoint.tensor_file import Named
from disttrain_trainer.runtime import machine, memory


class HostCopy:
    """The host's memory that holds the copy of named tensors; it is used again for the next one, and stays until the process ends.

    They lie in it as in a file, which is then written from there with no further copy.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, tensors: Named) -> dict[str, torch.Tensor]:
        """Copies of the tensors by name, dense, of the same shapes and dtypes, in the host's memory; blocks until all are made.

        They are valid until the next call, which uses their memory again: when it is made, no thread may read them any more. A GPU copies
        into pinned memory. For one thread at a time.
        """
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        sizes = {name: tensors[name].numel() * tensors[name].dtype.itemsize for name in tensor_file.in_order(tensors)}
        if len(self._memory) < (size := sum(sizes.values())):
            self._memory = (
                torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
                if devices
                else memory.zeros(size, torch.uint8)
            )
        copies, rest = {}, self._memory
        with torch.no_grad():
            for name, size in sizes.items():
                tensor = tensors[name]
                copies[name] = rest[:size].view(tensor.dtype).view(tensor.shape)
                copies[name].copy_(tensor, non_blocking=tensor.is_cuda)
                rest = rest[size:]
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copies


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
