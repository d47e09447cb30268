"""kubectl, as tests call it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class KubectlError(RuntimeError):
    """kubectl ended with an error; `stderr` is what it said."""

    def __init__(self, args: Sequence[str], code: int, stderr: str) -> None:
        super().__init__(f"kubectl {' '.join(args)} exited {code}: {stderr.strip()}")
        self.stderr = stderr
        self.code = code


def run_kubectl(
    program: Path,
    kubeconfig: Path,
    args: Sequence[str],
    *,
    prefix: Sequence[str] = (),
    input: str | dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    check: bool = True,
    timeout: float = 60,
) -> str:
    """Standard output of one kubectl command. Objects as input become the JSON of a List."""
    if input is not None and not isinstance(input, str):
        items = [input] if isinstance(input, dict) else list(input)
        input = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    env = {
        **os.environ,
        "KUBECACHEDIR": str(kubeconfig.parent / "kubectl-cache"),
        "KUBERC": "off",
    }  # nothing into ~/.kube
    argv = [*prefix, str(program), "--kubeconfig", str(kubeconfig), *args]
    done = subprocess.run(argv, input=input, text=True, capture_output=True, timeout=timeout, env=env)
    if check and done.returncode:
        raise KubectlError(args, done.returncode, done.stderr)
    return done.stdout
