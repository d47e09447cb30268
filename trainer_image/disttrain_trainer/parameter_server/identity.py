"""What two processes must agree on before they exchange parameters."""

import hashlib
import json

from disttrain.api.runtime import JobConfig


def config_digest(config: JobConfig) -> str:
    """sha256 over what decides the result of the training; addresses and time-outs may differ between processes."""
    decisive = config.model_dump(
        mode="json", include={"strategy", "trainer", "data", "workers", "processes_per_worker", "parameter_servers"}
    )
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
