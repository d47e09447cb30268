"""What a listener on the network finds of a training: its parameters, and nothing of them with network.tls Mutual."""

import contextlib
import select
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from disttrain.api import environment
from disttrain.api.names import Role
from training.job import MUTUAL, Job, digits, served

PLANTED = struct.pack("<f", 1.2345e-7) * 64
"""256 bytes of a parameter that never changes, as they lie in memory."""
MODEL = """
import torch
from disttrain_trainer.examples import digits

class Planted(torch.nn.Sequential):
    def __init__(self, inner):
        super().__init__(inner)
        self.planted = torch.nn.Parameter(torch.full((4096,), 1.2345e-7))

    def forward(self, batch):
        return super().forward(batch) + 0 * self.planted.sum()

def model(config):
    return Planted(digits.model(config))
"""


class Relay:
    """Between those who dial and the one who listens at an address: passes everything on, and keeps it."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._to = host, int(port)
        self._listener = socket.create_server((host, 0))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self.heard: list[bytes] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                dialer = self._listener.accept()[0]
                try:
                    listener = socket.create_connection(self._to)
                except OSError:  # no process listens yet, as the dialer would find itself
                    dialer.close()
                    continue
                threading.Thread(target=self._pass_on, args=(dialer, listener), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with one, other, contextlib.suppress(OSError):
            while ready := select.select([one, other], [], [])[0]:
                for end in ready:
                    data = end.recv(1 << 16)
                    if not data:
                        return
                    self.heard.append(data)
                    (other if end is one else one).sendall(data)


class Tapped(Job):
    """A job whose workers reach master and server through relays."""

    def tap(self) -> list[Relay]:
        addresses = self.config.addresses
        dialled = (addresses.control, addresses.rendezvous, *addresses.parameter_servers)
        self.relays = [Relay(address) for address in dialled]
        control, rendezvous, *servers = (relay.address for relay in self.relays)
        through = addresses.model_copy(
            update={"control": control, "rendezvous": rendezvous, "parameter_servers": tuple(servers)}
        )
        self.tapped = self.config.model_copy(update={"addresses": through})
        return self.relays

    def environment(self, role: Role, index: int) -> dict[str, str]:
        told = {environment.JOB: self.tapped.encode()} if role is Role.WORKER else {}
        return super().environment(role, index) | told


@pytest.mark.parametrize("network", [{}, MUTUAL], ids=["plain", "TLS"])
def test_a_planted_parameter_is_on_the_wire_only_without_tls(tmp_path: Path, network: dict[str, Any]) -> None:
    (tmp_path / "planted.py").write_text(MODEL)
    spec = digits(
        **served("Sync", servers=1), **network, trainer={"model": "planted:model", "epochs": None, "maxSteps": 20}
    )
    with Tapped(folder=tmp_path, spec=spec) as job, contextlib.ExitStack() as stack:
        relays = [stack.enter_context(contextlib.closing(relay)) for relay in job.tap()]
        assert job.train().step == 20
    heard = [b"".join(relay.heard) for relay in relays]
    control, _, server = heard
    assert len(server) > 20 * 4 * 4096
    for relayed, secret in ((control, job.config.uid.encode()), (server, PLANTED)):
        assert (secret in relayed) is (network == {}), secret


@pytest.mark.parametrize("network", [{}, MUTUAL], ids=["plain", "TLS"])
def test_where_the_ranks_find_one_another_is_on_the_wire_only_without_tls(
    tmp_path: Path, network: dict[str, Any]
) -> None:
    """What they then send one another is listened to in unit/trainer/test_wire_backend.py."""
    with (
        Tapped(folder=tmp_path, spec=digits(**network, trainer={"epochs": None, "maxSteps": 20})) as job,
        contextlib.ExitStack() as stack,
    ):
        relays = [stack.enter_context(contextlib.closing(relay)) for relay in job.tap()]
        assert job.train().step == 20
    control, rendezvous = (b"".join(relay.heard) for relay in relays)
    for relayed, secret in ((control, job.config.uid.encode()), (rendezvous, b"generation-1")):
        assert relayed
        assert (secret in relayed) is (network == {}), secret
