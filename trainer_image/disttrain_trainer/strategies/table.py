"""Which worker trains with which exchange: one line for each strategy of our loop. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import assert_never

from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import DataParallel, ModelParallel, ParameterServerStrategy, Sharding
from disttrain.api.trainer import ScriptLoop
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.group_member import GroupMember
from disttrain_trainer.net.members import CollectiveMember, ParameterServerMember
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process

WorkerMember = CollectiveMember | ParameterServerMember


@dataclass(frozen=True, slots=True)
class WorkerSide:
    """The worker's side of a strategy."""

    module: str
    """Has the role: `run(process, metrics, control, member)`. Imports torch, which takes seconds: only after HELLO."""
    member: Callable[[], WorkerMember]
    """Makes what the master knows of the worker."""

    def load(self) -> None:
        """Imports the role."""
        import_module(self.module)

    def run(self, process: Process, metrics: Metrics, control: ControlClient, member: WorkerMember) -> None:
        """Runs the role. Raises TrainerError, or what the user's code raises."""
        import_module(self.module).run(process, metrics, control, member)


_WHOLE = WorkerSide("disttrain_trainer.strategies.collective", CollectiveMember)
_GROUPED = WorkerSide("disttrain_trainer.strategies.group_rank", GroupMember)
_SHARDED = WorkerSide("disttrain_trainer.strategies.sharded", CollectiveMember)
_SERVED = WorkerSide("disttrain_trainer.strategies.parameter_server", ParameterServerMember)
_SCRIPT = WorkerSide("disttrain_trainer.strategies.own_loop", ParameterServerMember)


def search_changes_nothing(config: JobConfig) -> str | None:
    """What is said of trainer.findUnusedParameters where no strategy needs it; None where it has an effect, or is not set."""
    if not config.trainer.find_unused_parameters or side_of(config) is _WHOLE:
        return None
    return (
        "trainer.findUnusedParameters changes nothing with this strategy: parameters may take no part in a step, and only DataParallel "
        "with sharding Replicated sends gradients before backward has ended"
    )


def side_of(config: JobConfig) -> WorkerSide:
    """The worker's side of the job's strategy."""
    if isinstance(config.trainer.work, ScriptLoop):
        return _SCRIPT
    match config.strategy.exchange:
        case ParameterServerStrategy():
            return _SERVED if config.strategy.model_parallel is None else _GROUPED
        case DataParallel(sharding=Sharding.REPLICATED):
            return _WHOLE
        case DataParallel() | ModelParallel():
            return _SHARDED
        case unknown:
            assert_never(unknown)
