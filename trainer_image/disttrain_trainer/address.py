"""The addresses that a job names: host:port to connect to, and where to listen so that they are reached."""

import ipaddress

from disttrain_trainer.errors import WrongInput


def split_address(address: str) -> tuple[str, int]:
    """host and port of "host:port"; IPv6 hosts stand in brackets. Raises WrongInput."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise WrongInput(f"{address!r} is no address; expected host:port")
    return host.strip("[]"), int(port)


def listening_host(host: str) -> str | None:
    """Loopback stays loopback; any other name, such as a pod's, means all interfaces: None."""
    try:
        return host if ipaddress.ip_address(host).is_loopback else None
    except ValueError:
        return "127.0.0.1" if host == "localhost" else None
