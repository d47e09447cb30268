"""Bytes that went over a process's connections to the other ranks, as the kernel counts them.

torch reports no bytes of its groups, and what a ring should move is not what it moves: headers, hand-overs of state and steps that broke
are bytes, too. gloo moves all of its data over TCP; NCCL does not, so that nothing is known there.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterable
from typing import Final

_FDS: Final = "/proc/self/fd"
_ACKED, _RECEIVED = 120, 128
"""Offsets in struct tcp_info (linux/tcp.h): tcpi_bytes_acked and tcpi_bytes_received, 64 bits each; Linux 4.1 or later."""
_SIZE: Final = 136


class Traffic:
    """Bytes sent and received over connections, open and closed ones. They never go back."""

    def __init__(self, *, besides: frozenset[int]) -> None:
        """besides: ports at which something else than a rank listens, such as torch's store."""
        self._besides = besides
        self._closed = (0, 0)
        self._open: dict[int, tuple[int, int]] = {}
        """By inode, as they were when last looked at."""

    def look(self, inodes: Iterable[int]) -> tuple[int, int]:
        """Bytes sent and received until now, these open connections included. Others are taken for closed."""
        wanted = set(inodes)
        for inode in self._open.keys() - wanted:
            sent, received = self._open.pop(inode)
            self._closed = (self._closed[0] + sent, self._closed[1] + received)
        for inode, counts in _counts(wanted, self._besides).items():
            self._open[inode] = counts
        return (
            self._closed[0] + sum(sent for sent, _ in self._open.values()),
            self._closed[1] + sum(received for _, received in self._open.values()),
        )


def _counts(inodes: set[int], besides: frozenset[int]) -> dict[int, tuple[int, int]]:
    """Bytes acknowledged by the peer, and received, by inode. A socket that is closed meanwhile, or listens, is left out."""
    found: dict[int, tuple[int, int]] = {}
    if not inodes:
        return found
    with contextlib.suppress(FileNotFoundError):  # no /proc
        for name in os.listdir(_FDS):
            with contextlib.suppress(OSError):
                inode = os.stat(f"{_FDS}/{name}").st_ino
                if inode not in inodes or inode in found:
                    continue
                # A copy: the number may belong to another socket by the time of the call.
                with socket.socket(fileno=os.dup(int(name))) as copy:
                    if os.fstat(copy.fileno()).st_ino != inode:
                        continue
                    if copy.getpeername()[1] in besides:  # raises when it listens
                        continue
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
                    if len(info) == _SIZE:
                        found[inode] = struct.unpack_from("=QQ", info, _ACKED)
    return found
