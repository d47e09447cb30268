"""What a process of a small job is told, for tests that need any job at all."""

from disttrain.api.runtime import Addresses, JobConfig
from disttrain.api.strategy import Strategy
from disttrain.api.trainer import Trainer


def command_config(*, workers: int = 1, address: str = "127.0.0.1:9") -> JobConfig:
    """A command with its control connection and its store at this address, where by default nobody listens."""
    return JobConfig(
        namespace="team",
        name="job",
        uid="u",
        attempt=1,
        strategy=Strategy.model_validate({"type": "DataParallel"}),
        trainer=Trainer(command=("true",)),
        workers=workers,
        addresses=Addresses(control=address, rendezvous=address),
    )
