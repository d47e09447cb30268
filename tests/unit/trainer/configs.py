"""The configuration of a process of a small job, for tests that need any job at all."""

from configs import config_of
from disttrain.api.runtime import Addresses, JobConfig


def command_config(*, workers: int = 1, address: str = "127.0.0.1:9") -> JobConfig:
    """A command with its control connection and its store at this address, where by default no process listens."""
    spec = {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["true"]}, "worker": {"replicas": workers}}
    return config_of(spec, namespace="team", addresses=Addresses(control=address, rendezvous=address))
