"""Which process of the job this is: the environment, read once and checked."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from disttrain.api import environment
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig, RestartsInPlace
from disttrain_trainer.errors import WrongInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of a job."""

    config: JobConfig
    role: Role
    index: int
    """Index of the pod within its role."""
    local_rank: int = 0
    """Number of the training process within its pod."""
    world_size: int = 0
    """Training processes that the job was to have when this one was started; 0: not said."""
    steps_done: int = 0
    """Steps that the job had done before this process."""
    roll_back: tuple[int, int] | None = None
    """(attempt, step): checkpoints of later steps that attempts before that one wrote are not taken any more."""
    checkpoint_dir: Path | None = None
    model_dir: Path | None = None
    """Where the trained model is put at the end of a training of our own loop."""
    data_dir: Path | None = None
    code_dir: Path | None = None
    """The folder of trainer.code; None without code, and in a role that runs none."""
    code_digest: str | None = None
    copies_dir: Path | None = None
    """Where a worker keeps its copies of the data (data.replication)."""
    copies_limit: int | None = None
    """Bytes that the pod may take of its node's disk; None: no limit is known."""
    tls_dir: Path | None = None
    """The folder of the attempt's certificate; None where network.tls is Disabled."""
    metrics_port: int | None = None
    termination_log: Path | None = None
    pod: str | None = None
    """uid of the pod; None where no plan counts what is restarted in it."""
    restarts: RestartsInPlace | None = None
    """Processes of the pod that ended before this one and were started again in place."""
    unknown: tuple[str, ...] = ()
    """Fields of the configuration that this version does not know: the operator is of a later release."""
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8))
    """Drawn at the start: a replacement of the same name is another process."""

    @property
    def rank(self) -> int:
        """Number of the process within its role, over all pods."""
        if self.role is Role.WORKER:
            return self.index * self.config.processes_per_worker + self.local_rank
        return self.index

    @property
    def machine_rank(self) -> int:
        """Number of the training process among those of its machine, LOCAL_RANK: it picks the GPU."""
        return self.config.local_rank(self.rank)

    @property
    def name(self) -> str:
        """How logs and messages call it: worker-1, or worker-1.3 where a pod has several processes."""
        suffix = f".{self.local_rank}" if self.role is Role.WORKER and self.config.processes_per_worker > 1 else ""
        return f"{self.role.value}-{self.index}{suffix}"

    @property
    def labels(self) -> dict[str, object]:
        """The process's place in the job, for each line of a JSON log."""
        config = self.config
        return {
            "job": f"{config.namespace}/{config.name}",
            "uid": config.uid,
            "attempt": config.attempt,
            "role": self.role.value,
            "rank": self.rank,
        }

    @classmethod
    def read(
        cls, environ: Mapping[str, str], *, local_rank: int = 0, restarts: RestartsInPlace | None = None
    ) -> "Process":
        """The process that the environment describes. Raises WrongInput, which names the variable."""
        try:
            config, unknown = JobConfig.decode(_required(environ, environment.JOB))
        except ValueError as error:
            raise WrongInput(f"{environment.JOB}: {error}; the operator or `disttrain run` sets it") from None
        role = _required(environ, environment.ROLE)
        if role not in list(Role):
            raise WrongInput(f"{environment.ROLE}: {role!r} is no role; expected one of {', '.join(Role)}")
        checkpoint_dir = _path(environ, environment.CHECKPOINT_DIR) if config.checkpoint else None
        if (log_format := environ.get(environment.LOG_FORMAT, "text")) not in ("text", "json"):
            raise WrongInput(f"{environment.LOG_FORMAT}: {log_format!r} is no log format; expected text or json")
        return cls(
            config=config,
            unknown=unknown,
            role=Role(role),
            index=_number(environ, environment.INDEX, default=0),
            local_rank=local_rank,
            restarts=restarts,
            pod=environ.get(environment.POD_UID) or None,
            world_size=_number(environ, environment.WORLD_SIZE, default=0),
            steps_done=_number(environ, environment.STEPS_DONE, default=0),
            roll_back=_roll_back(environ),
            checkpoint_dir=checkpoint_dir,
            model_dir=_path(environ, environment.MODEL_DIR) or checkpoint_dir,
            data_dir=_path(environ, environment.DATA_DIR),
            code_dir=_path(environ, environment.CODE_DIR),
            copies_dir=_path(environ, environment.COPIES_DIR),
            copies_limit=_number(environ, environment.COPIES_LIMIT, default=0) or None,
            tls_dir=_path(environ, environment.TLS_DIR),
            metrics_port=_number(environ, environment.METRICS_PORT, default=0) or None,
            termination_log=_path(environ, environment.TERMINATION_LOG),
        )


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:
        raise WrongInput(f"{name} is not set; start the job with the operator or `disttrain run`, which set it")
    return value


def _number(environ: Mapping[str, str], name: str, *, default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise WrongInput(f"{name}: {text!r} is no number; expected one such as 0")
    return int(text)


def _roll_back(environ: Mapping[str, str]) -> tuple[int, int] | None:
    text = environ.get(environment.ROLL_BACK, "")
    if not text:
        return None
    attempt, _, step = text.partition(":")
    if not (attempt.isdecimal() and step.isdecimal()):
        raise WrongInput(f"{environment.ROLL_BACK}: {text!r} is no attempt and step; expected such as 3:120")
    return int(attempt), int(step)


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    # Absolute: user code may change the current folder.
    return Path(environ[name]).absolute() if environ.get(name) else None
