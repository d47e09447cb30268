"""Ports of a local run."""

from __future__ import annotations

import socket

import pytest

from disttrain.api.names import Role
from disttrain.local.addresses import Ports


def test_a_replica_keeps_its_ports_and_no_two_are_alike() -> None:
    ports = Ports()
    drawn = [ports.port(Role.WORKER, index, use) for index in range(5) for use in ("metrics", "data")]
    assert drawn == [ports.port(Role.WORKER, index, use) for index in range(5) for use in ("metrics", "data")]
    assert len(set(drawn)) == 10
    ports.close()


def test_a_server_can_listen_on_a_port_that_is_held_again_and_again() -> None:
    ports = Ports()
    address = ("127.0.0.1", ports.port(Role.MASTER, 0, "control"))
    for _ in range(3):
        with socket.create_server(address) as server, socket.create_connection(address):
            server.accept()[0].close()
    ports.close()


def test_a_port_that_is_held_is_not_drawn_again() -> None:
    ports, others = Ports(), Ports()
    port = ports.port(Role.MASTER, 0, "control")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    assert port not in [others.port(Role.MASTER, index, "control") for index in range(50)]
    ports.close()
    others.close()
