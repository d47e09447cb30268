"""The operator's settings: one frozen model, filled from the command line, then the environment, then the defaults.

Every field is a flag (`resync_seconds` is --resync-seconds) and a variable (DISTTRAIN_OPERATOR_RESYNC_SECONDS). Nothing else reads either.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

ENVIRONMENT_PREFIX = "DISTTRAIN_OPERATOR_"
Seconds = Annotated[float, Field(gt=0, le=86_400)]
DnsLabel = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]


class ProgressPath(StrEnum):
    """How the operator reaches a job's master."""

    AUTO = "Auto"
    """Pod inside a cluster, ApiServer outside."""
    POD = "Pod"
    """Straight to the pod's address."""
    API_SERVER = "ApiServer"
    """Through the API server's proxy, from where pods cannot be reached; needs the right `get pods/proxy`."""


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class Settings(BaseModel):
    """How this operator runs. What a job wants is in the job."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    namespaces: tuple[DnsLabel, ...] = ()
    """Namespaces to serve, separated by commas. Default: all of the cluster."""
    trainer_image: Annotated[str, StringConstraints(pattern=r"^[^\s]+$")] = "disttrain/trainer:latest"
    """Image of the training containers of jobs that name none."""
    workers: Annotated[int, Field(ge=1, le=256)] = 16
    """Jobs reconciled at the same time."""
    requests: Annotated[int, Field(ge=1, le=1024)] = 32
    """Creations and deletions in flight at the same time, over all jobs."""
    request_timeout_seconds: Seconds = 15
    """Seconds until a request to the API server times out and its job is queued again."""
    resync_seconds: Seconds = 60
    """Seconds between two full comparisons of the cache with the API server, which heal what a watch missed."""
    status_write_seconds: Annotated[float, Field(ge=0, le=60)] = 2
    """Seconds between a write of a job's status and the next one that can wait: counts, progress, the stages of a start."""
    allow_host_access: bool = False
    """Make pods that reach into their nodes where a template says so: hostPath, hostNetwork, hostPID, hostIPC, hostUsers, nodeName."""
    progress: ProgressPath = ProgressPath.AUTO
    """How the masters' progress is read: Auto, Pod or ApiServer."""
    host: str = "0.0.0.0"
    """Address of /healthz, /readyz and /metrics."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    """Port of /healthz, /readyz and /metrics; 0: any free one, which the log names."""
    leader_elect: bool = False
    """Take a Lease before acting, so that of several replicas only one does."""
    lease_name: DnsLabel = "disttrain-operator"
    """Name of that Lease."""
    lease_namespace: DnsLabel = "disttrain-system"
    """Namespace of that Lease."""
    shutdown_seconds: Seconds = 10
    """Seconds that passes in flight are given to end after SIGTERM."""
    log_level: Annotated[str, StringConstraints(pattern=r"^(debug|info|warning|error)$")] = "info"
    """debug, info, warning or error."""
    log_format: LogFormat = LogFormat.TEXT
    """text, or json: one object a line."""

    @field_validator("namespaces", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @classmethod
    def load(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> "Settings":
        """The settings of a command line and an environment. A wrong one is said in one line each, with exit code 2."""
        given: dict[str, Any] = {
            name: environment[variable(name)] for name in cls.model_fields if environment.get(variable(name))
        }
        given |= {name: value for name, value in vars(_parser().parse_args(arguments)).items() if value is not None}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            _refuse(error)


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def variable(field: str) -> str:
    return ENVIRONMENT_PREFIX + field.upper()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="disttrain-operator",
        description="Runs DistTrainJobs on the cluster of the current kubeconfig, or of the pod's own account.",
        epilog=f"Every flag can be set in the environment too, such as {variable('resync_seconds')}=30.",
    )
    for name, field in Settings.model_fields.items():
        text = (field.description or "").replace("%", "%%") + (
            "" if field.default in ((), False) else f" [{field.default}]"
        )
        if field.annotation is bool:
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag(name), metavar="VALUE", default=None, help=text)
    return parser


def _refuse(error: ValidationError) -> NoReturn:
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        print(
            f"disttrain-operator: {flag(name)} ({variable(name)}): {problem['input']!r}: {problem['msg']}",
            file=sys.stderr,
        )
    sys.exit(2)
