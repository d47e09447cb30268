"""Which worker trains with which exchange: one line for each strategy of our loop. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import DataParallel, Exchange, ParameterServerStrategy
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.net.control_client import ControlClient
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


_SIDES: dict[type[Exchange], WorkerSide] = {
    DataParallel: WorkerSide("disttrain_trainer.strategies.collective", CollectiveMember),
    ParameterServerStrategy: WorkerSide("disttrain_trainer.strategies.parameter_server", ParameterServerMember),
}


def side_of(config: JobConfig) -> WorkerSide:
    """The worker's side of the job's strategy. Raises WrongInput for one that this trainer does not know."""
    side = _SIDES.get(type(config.strategy.exchange))
    if side is None:
        raise WrongInput(
            f"strategy.type: this trainer does not know {config.strategy.type}; use an image of the operator's release"
        )
    return side
