"""Sockets to listen on, for IPv4 and IPv6 alike: a pod may have addresses of one kind only. Not here: who serves on them."""

import errno
import socket

BACKLOG = 1024


def listen(host: str | None, port: int) -> socket.socket:
    """A listening socket at this address; None: at every address of the machine. Raises OSError when the port is taken."""
    if host is not None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        except OSError as error:
            # The kernel knows IPv6, but no interface has it.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return socket.create_server(("", port), backlog=BACKLOG)
