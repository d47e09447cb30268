"""Connections for tests: certificates of a job, and two ends that know one another."""

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from configs import config_of
from disttrain import certificates
from disttrain.api.job import Metadata
from disttrain.api.runtime import JobConfig
from disttrain_trainer.net import transport
from disttrain_trainer.net.transport import Connection, Transport

JOB = Metadata(name="job", namespace="default", uid="0b5e9f0c-5a4e-4a86-9f0a-1d5a4c3b2a10")
SPEC = {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["true"]}, "network": {"tls": "Mutual"}}


def certificate(folder: Path, job: Metadata = JOB, *, attempt: int = 1, age: timedelta = timedelta(0)) -> Path:
    """The folder, with the certificate of a job's attempt in it. age: since it was made, of a lifetime of two hours."""
    folder.mkdir(parents=True, exist_ok=True)
    made = certificates.of_attempt(job, attempt, now=datetime.now(UTC) - age, lifetime=timedelta(hours=2))
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return folder


def mutual_config(job: Metadata = JOB) -> JobConfig:
    return config_of(SPEC, namespace=job.namespace, name=job.name, uid=job.uid)


def certified(folder: Path, job: Metadata = JOB, *, attempt: int = 1, age: timedelta = timedelta(0)) -> Transport:
    """The transport of a process of that job, with a certificate of its own making."""
    return transport.of(mutual_config(job), certificate(folder, job, attempt=attempt, age=age))


@contextlib.contextmanager
def connected(
    one: Transport, other: Transport | None = None, *, timeout: float = 20
) -> Iterator[tuple[Connection, Connection]]:
    """Both ends of a connection, verified: the one that dialled, and the one that accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as threads:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        dialled = threads.submit(one.dial, address, timeout=timeout, within=20)
        accepted = (other or one).accept(listener.accept()[0], timeout=timeout)
        try:
            accepted.handshake(within=20)
            with contextlib.closing(dialled.result()) as connection:
                yield connection, accepted
        finally:
            accepted.close()
