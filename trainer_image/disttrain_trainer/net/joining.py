"""Join tokens (disttrain.api.joining): a process reads its own, the master judges those of others."""

import hmac

from disttrain.api.joining import JOIN_KEY, join_file, join_token
from disttrain.api.names import Role
from disttrain.api.policies import Tls
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime.process import Process


def token_of(process: Process) -> str:
    """The token of this process; "" where network.tls is Disabled. Raises WrongInput when it cannot be read."""
    return _read(process, join_file(process.role, process.index)).decode(errors="replace")


class Judge:
    """The master's judgement of who may be which process."""

    def __init__(self, key: bytes, processes_per_worker: int) -> None:
        """key: of the attempt; b"": every process is believed, as without network.tls."""
        self._key, self._processes_per_worker = key, processes_per_worker

    @classmethod
    def of(cls, process: Process) -> "Judge":
        """That of the master's own process. Raises WrongInput when its key cannot be read."""
        key = _read(process, JOIN_KEY)
        if not key and process.config.tls is Tls.MUTUAL:
            raise WrongInput("network.tls is Mutual, and the master has no join key: its Secret is not of this release")
        return cls(key, process.config.processes_per_worker)

    def objection(self, role: Role, rank: int, token: str) -> str | None:
        """Why a process with this token is not the one that it says it is; None when it is."""
        if not self._key:
            return None
        index = rank // self._processes_per_worker if role is Role.WORKER else rank
        if hmac.compare_digest(token.encode(), join_token(self._key, role, index).encode()):
            return None
        return f"its join token is not that of {role.value}-{index} of this attempt"


def _read(process: Process, name: str) -> bytes:
    if process.config.tls is Tls.DISABLED or process.tls_dir is None:
        return b""
    try:
        return (process.tls_dir / name).read_bytes()
    except OSError as error:
        raise WrongInput(f"{process.tls_dir / name}: the join token cannot be read: {error.strerror}") from None
