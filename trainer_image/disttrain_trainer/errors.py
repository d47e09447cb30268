"""How a training process fails, and the exit code it answers with.

TrainerError
├── PeerLost            75: a peer was lost or a wait ran out; the process is restarted
│   ├── RoundOver           the round of the call is over; the process asks the master for the next one
│   └── Refused             the peer refuses this process: another job or attempt, or an older incarnation
├── FactoryNotRepeatable 75: this process cannot make the initial parameters again; a new one can (model/initial.py)
├── Unreadable         134: the checkpoint volume cannot be read (checkpoint/store.py)
├── Unsaved            134: the last checkpoint could not be written (checkpoint/final.py)
├── DataUnreadable     134: packed data cannot be read (data/opening.py)
├── LoaderLost         134: a loader process was killed (data/loader_processes.py)
├── WrongInput           2: something that the job names is missing, wrong or damaged
├── ProgramFailed        n: the user's script ended so
└── UserError            1: the user's code raised, or made parameters that are not finite

Any other exception of a worker counts as the user's, too: 1. Master and servers run no user code: their exceptions are mistakes of ours or
of the machine (no memory), CRASHED. A new process may succeed, so the failure is retried, and counts towards the limit.
"""

from typing import ClassVar, Final

from disttrain.api.environment import ExitCode

CRASHED: Final = 128 + 6
"""The exit code of a program that ends by abort(): SIGABRT."""


class TrainerError(Exception):
    """The base of every error that ends a role on purpose."""

    exit_code: ClassVar[ExitCode]


class PeerLost(TrainerError):
    """A peer was lost or a wait ran out. Never the root cause of a failed job.

    what: the peer and its address, such as "parameter-server-1 (10.0.0.7:7780)".
    why: what happened and what was waited for.
    """

    exit_code = ExitCode.PEER_LOST

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what = what
        self.why = why


class RoundOver(PeerLost):
    """The round of the call is over: a server was lost, and the model rolled back. The process can go on in the next one."""


class Refused(PeerLost):
    """The peer refuses this process: it is of another job or attempt, or was replaced by a newer incarnation."""


class WrongInput(TrainerError):
    """Something that the job names is missing or wrong: a module, a factory, a file, a model that does not fit the checkpoint."""

    exit_code = ExitCode.WRONG_INPUT


class DataUnreadable(TrainerError):
    """A file of a packed data set cannot be read now. Retryable, and counted: a volume that answers again is read."""

    exit_code: ClassVar = CRASHED  # type: ignore[assignment]


class LoaderLost(TrainerError):
    """A process of trainer.loaderWorkers ended. Retryable, and counted: a new training process has new ones."""

    exit_code: ClassVar = CRASHED  # type: ignore[assignment]


class UserError(TrainerError):
    """The user's code raised."""

    exit_code = ExitCode.USER_ERROR


class ProgramFailed(TrainerError):
    """The user's script or command failed; this process answers with the same code.

    last_line, where: the last line that the program printed, and the file and line in it.
    """

    def __init__(self, code: int, message: str, *, last_line: str = "", where: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.last_line = last_line
        self.where = where


class Terminated(BaseException):
    """The process was asked to end by SIGTERM, and did before what it could. Not an Exception: no handler of a user catches it."""

    exit_code: Final = 128 + 15


class OwnGroup(WrongInput):
    """User code makes torch's default process group: DistTrain makes that one, in every round again, and the store at MASTER_PORT is the
    master's."""

    def __init__(self, field: str, where: str = "") -> None:
        super().__init__(
            f"{field} calls torch.distributed.init_process_group{where}, but DistTrain makes the process group of its own loop: "
            "remove the call, or run the program as trainer.script"
        )
        self._where = where

    def by_script(self) -> WrongInput:
        """The same, of a script on parameter servers."""
        return WrongInput(
            f"trainer.script calls torch.distributed.init_process_group{self._where}, but with strategy.type ParameterServer the servers "
            "exchange the gradients: remove the call, or use strategy.type DataParallel without session.parameter_server"
        )

    def by(self, field: str) -> "OwnGroup":
        """The same, of the code that this field names."""
        return OwnGroup(field, self._where)
