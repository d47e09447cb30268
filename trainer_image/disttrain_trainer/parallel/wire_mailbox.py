"""Messages between two ranks over connections of ours: a send with a tag, and the receive that waits for it, in whatever order."""

import threading
from collections import defaultdict, deque

import torch

from disttrain_trainer.model.flat import bytes_of
from disttrain_trainer.parallel.backend import BrokenGroup
from disttrain_trainer.parallel.operation import Operation
from disttrain_trainer.parallel.wire import Receiver
from disttrain_trainer.parallel.wire_tensors import is_plain


class Mailbox:
    """Messages of the peers and those who wait for them: in the order of their coming and of their calls, for each peer and tag."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: defaultdict[tuple[int, int], deque[tuple[torch.Tensor, Operation]]] = defaultdict(deque)
        self._arrived: defaultdict[tuple[int, int], deque[torch.Tensor]] = defaultdict(deque)
        self._lost: dict[int, BrokenGroup] = {}
        self._end: BrokenGroup | None = None

    def receive(self, peer: int, tag: int, tensor: torch.Tensor, operation: Operation) -> None:
        """The next message with this tag goes into the tensor."""
        error: Exception | None = None
        with self._lock:
            arrived = self._arrived[peer, tag]
            message = arrived.popleft() if arrived else None
            if message is None:
                error = self._end or self._lost.get(peer)
                if error is None:
                    self._waiting[peer, tag].append((tensor, operation))
                    return
        operation.end_part(error if message is None else _deliver(message, tensor))

    def fill(self, peer: int, receiver: Receiver) -> None:
        """Reads the messages of a peer until the connection is lost."""
        try:
            while True:
                tag, _, size = receiver.head()
                self._read(peer, tag, size, receiver)
        except OSError as error:
            broken = lost(peer, error)
        with self._lock:
            self._lost[peer] = broken
            over = [one for key, waiting in self._waiting.items() if key[0] == peer for one in waiting]
            for key in [key for key in self._waiting if key[0] == peer]:
                del self._waiting[key]
        for _, operation in over:
            operation.end_part(broken)

    def close(self, error: BrokenGroup) -> None:
        """No message will come."""
        with self._lock:
            self._end = self._end or error
            over = [one for waiting in self._waiting.values() for one in waiting]
            self._waiting.clear()
        for _, operation in over:
            operation.end_part(error)

    def _read(self, peer: int, tag: int, size: int, receiver: Receiver) -> None:
        with self._lock:
            waiting = self._waiting[peer, tag]
            tensor, operation = waiting.popleft() if waiting else (None, None)
        if tensor is not None and operation is not None and is_plain(tensor) and tensor.nbytes == size:
            try:
                receiver.fill(bytes_of(tensor.detach().view(-1)))
            except OSError as error:
                operation.end_part(lost(peer, error))
                raise
            operation.end_part()
            return
        message = torch.empty(size, dtype=torch.uint8)
        try:
            receiver.fill(bytes_of(message))
        except OSError as error:
            if operation is not None:
                operation.end_part(lost(peer, error))
            raise
        if tensor is None or operation is None:
            with self._lock:
                waiting = self._waiting[peer, tag]
                if not waiting:
                    self._arrived[peer, tag].append(message)
                    return
                tensor, operation = waiting.popleft()
        operation.end_part(_deliver(message, tensor))


def lost(peer: int, error: OSError) -> BrokenGroup:
    """The error of a connection as that of its group."""
    return BrokenGroup(f"the connection from rank {peer} is lost: {error}")


def _deliver(message: torch.Tensor, tensor: torch.Tensor) -> Exception | None:
    if message.numel() != tensor.nbytes:
        return ValueError(f"a message of {message.numel()} bytes came for a tensor of {tensor.nbytes}")
    tensor.detach().copy_(message.view(tensor.dtype).view(tensor.shape))
    return None
