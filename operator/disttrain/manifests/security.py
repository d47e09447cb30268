"""The security settings of every pod: the `restricted` Pod Security Standard, and no way for a template to loosen it.

What a template adds elsewhere (hostPath, hostNetwork) is judged by the namespace's Pod Security admission, not here.
"""

from typing import Any

NON_ROOT = 65532
"""User and group where neither image nor template names one: distroless' nonroot."""


def pod_security(template: dict[str, Any]) -> dict[str, Any]:
    """The pod's securityContext: what the template says, under what it may not undo."""
    # fsGroup makes a new checkpoint volume writable for a user that is not root; OnRootMismatch spares a large one the walk at each start.
    defaults = {
        "runAsUser": NON_ROOT,
        "runAsGroup": NON_ROOT,
        "fsGroup": NON_ROOT,
        "fsGroupChangePolicy": "OnRootMismatch",
    }
    return {**defaults, **template, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def container_security(template: dict[str, Any]) -> dict[str, Any]:
    """The securityContext of the trainer container."""
    return {**template, **_restricted(), "readOnlyRootFilesystem": True}


def sidecar_security(template: dict[str, Any]) -> dict[str, Any]:
    """That of a template's own containers: restricted too, but with a root filesystem that they may need to write."""
    return {**template, **_restricted()}


def _restricted() -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
