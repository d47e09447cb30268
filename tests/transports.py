"""Connections for tests: certificates of a job, two ends that know one another, and a rendezvous store."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from configs import config_of
from disttrain import certificates
from disttrain.api.job import Metadata
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.net import transport
from disttrain_trainer.net.connection import Connection
from disttrain_trainer.net.rendezvous import RendezvousServer
from disttrain_trainer.net.tls import RECORDS
from disttrain_trainer.net.transport import Transport
from disttrain_trainer.runtime.sockets import listen

JOB = Metadata(name="job", namespace="default", uid="0b5e9f0c-5a4e-4a86-9f0a-1d5a4c3b2a10")
TRAINER = {"model": "a:b", "dataset": "a:c", "optimizer": {"name": "SGD", "learningRate": 0.1}, "epochs": 1}
SPEC = {"strategy": {"type": "DataParallel"}, "trainer": TRAINER, "network": {"tls": "Mutual"}}


def certificate(folder: Path, job: Metadata = JOB, *, attempt: int = 1, age: timedelta = timedelta(0)) -> Path:
    """The folder, with the certificate of a job's attempt in it. age: since it was made, of a lifetime of two hours."""
    folder.mkdir(parents=True, exist_ok=True)
    made = certificates.of_attempt(job, attempt, now=datetime.now(UTC) - age, lifetime=timedelta(hours=2))
    processes = [(role, index) for role in (Role.PARAMETER_SERVER, Role.WORKER) for index in range(8)]
    for name, content in (made | certificates.join_secrets(processes)).items():
        (folder / name).write_bytes(content)
    return folder


def mutual_config(job: Metadata = JOB) -> JobConfig:
    return config_of(SPEC, namespace=job.namespace, name=job.name, uid=job.uid)


def certified(
    folder: Path, job: Metadata = JOB, *, attempt: int = 1, age: timedelta = timedelta(0), records: int = RECORDS
) -> Transport:
    """The transport of a process of that job, with a certificate of its own making. records: that one key encrypts."""
    certificate(folder, job, attempt=attempt, age=age)
    return certified_by(folder, job, records=records)


def certified_by(folder: Path, job: Metadata = JOB, *, records: int = RECORDS) -> Transport:
    """The transport of a process of that job, with the certificate that is there."""
    return transport.of(mutual_config(job), folder, records=records)


@contextlib.contextmanager
def connected(
    one: Transport, other: Transport | None = None, *, timeout: float = 20
) -> Iterator[tuple[Connection, Connection]]:
    """Both ends of a connection, verified: the one that dialled, and the one that accepted."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        beside = (other or one).listen_beside(listener)
        accepting = listener if beside is None else stack.enter_context(beside)
        threads = stack.enter_context(ThreadPoolExecutor())
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        dialled = threads.submit(one.dial, address, timeout=timeout, within=20)
        accepted = (other or one).accept(accepting.accept()[0], timeout=timeout)
        try:
            accepted.handshake(within=20)
            with contextlib.closing(dialled.result()) as connection:
                yield connection, accepted
        finally:
            accepted.close()


class Rendezvous:
    """The master's end of the rendezvous store, in a thread."""

    def __init__(self, transport: Transport) -> None:
        self._loop = asyncio.new_event_loop()
        listener = listen("127.0.0.1", 0)
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self._server = RendezvousServer(context=transport.context, processes=4)
        self._serving = self._loop.create_task(self._server.serve(listener))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def renew(self) -> None:
        """A new round begins."""
        self._loop.call_soon_threadsafe(self._server.renew)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serving)
        self._loop.run_until_complete(asyncio.sleep(0))
