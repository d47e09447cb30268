"""kubectl, as tests call it, and the users that it speaks for."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.apiserver import Layout
from cluster.programs import program


class KubectlError(RuntimeError):
    """kubectl ended with an error; `stderr` is what it said."""

    def __init__(self, args: Sequence[str], code: int, stderr: str) -> None:
        super().__init__(f"kubectl {' '.join(args)} exited {code}: {stderr.strip()}")
        self.stderr = stderr
        self.code = code


class Kubectl:
    """The API of a cluster, by kubectl: what a control plane and a whole node share. Its `layout` comes with the cluster's start."""

    layout: Layout

    def __init__(self) -> None:
        self._users: dict[str, Path] = {}

    @property
    def _kubectl_prefix(self) -> Sequence[str]:
        """What puts kubectl where it reaches the API server."""
        return ()

    def kubectl(
        self,
        *args: str,
        input: str | dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        user: str = "admin",
        check: bool = True,
        timeout: float = 60,
    ) -> str:
        """Standard output of `kubectl`; KubectlError (with .stderr) when it fails and `check` is on. Objects as input become a List."""
        if input is not None and not isinstance(input, str):
            items = [input] if isinstance(input, dict) else list(input)
            input = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
        config = self.kubeconfig_for(user)
        env = {
            **os.environ,
            "KUBECACHEDIR": str(config.parent / "kubectl-cache"),
            "KUBERC": "off",
        }  # nothing into ~/.kube
        argv = [*self._kubectl_prefix, str(program("kubectl")), "--kubeconfig", str(config), *args]
        done = subprocess.run(argv, input=input, text=True, capture_output=True, timeout=timeout, env=env)
        if check and done.returncode:
            raise KubectlError(args, done.returncode, done.stderr)
        return done.stdout

    def get(self, kind: str, name: str = "", *, namespace: str = "default") -> Any:
        """An object, or with no name the list of a namespace's objects."""
        found = json.loads(self.kubectl("get", kind, *([name] if name else []), "-n", namespace, "-o", "json"))
        return found if name else found["items"]

    def kubeconfig_for(self, user: str, groups: Sequence[str] = (), *, namespace: str = "default") -> Path:
        """A kubeconfig with a client certificate for a user, who may do what roles are bound to it: at first nothing."""
        if user not in self._users:
            name = user.replace(":", "-").replace("/", "-")
            self._users[user] = self.layout.authority.kubeconfig(name, self.layout.server, user, groups, namespace)
        return self._users[user]
