"""The endpoint of the master to which programs that know Kubeflow's Trainer report (KEP-2779 of kubeflow/trainer), such as the callback of
transformers: three variables of the environment switch it on, and it posts JSON with a bearer token that it reads from a file.

Not here: what a report says (the trainer's coordinator/trainer_status.py).
"""

import hmac
from typing import Final

SERVER_URL: Final = "KUBEFLOW_TRAINER_SERVER_URL"
SERVER_TOKEN: Final = "KUBEFLOW_TRAINER_SERVER_TOKEN"
"""The path of a file with the token."""
PREFIX: Final = "KUBEFLOW_TRAINER_"
PATH: Final = "/trainer-status"
"""At the metrics port of the master."""
TOKEN_FILE: Final = "token"


def token(uid: str, attempt: int) -> str:
    """The bearer token of an attempt, in hex. As on the control connection, who knows the job's uid may report."""
    return hmac.new(uid.encode(), f"trainer-status-{attempt}".encode(), "sha256").hexdigest()
