"""Where the processes of a local run listen: ports of loopback, the same ones for a replica and for all its successors.

A port is held by a bound socket that never listens. A program that sets SO_REUSEADDR, as every server does, can listen on it all the
same; another run that looks for a free port does not get it. Not here: which process listens where (manifests/environment.py).
"""

import socket
from typing import Final

from disttrain.api.names import Role

LOOPBACK: Final = "127.0.0.1"
LOCAL_NODE: Final = "localhost"
"""The node of every process of a local run."""


class Ports:
    """The ports of one run, handed out when first asked for."""

    def __init__(self) -> None:
        self._held: dict[tuple[Role, int, str], socket.socket] = {}

    def port(self, role: Role, index: int, use: str) -> int:
        """The port of a replica for one use: control, rendezvous, data or metrics."""
        key = (role, index, use)
        if key not in self._held:
            self._held[key] = _bound()
        return int(self._held[key].getsockname()[1])

    def address(self, role: Role, index: int, use: str) -> str:
        """host:port of a replica for one use."""
        return f"{LOOPBACK}:{self.port(role, index, use)}"

    def close(self) -> None:
        """Gives the ports back."""
        for held in self._held.values():
            held.close()
        self._held.clear()


def _bound() -> socket.socket:
    # Port 0 with SO_REUSEADDR may be given a port that another such socket holds: ask without, then set it for those who join.
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.bind((LOOPBACK, 0))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return held
