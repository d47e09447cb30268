"""The security settings of every pod: the `restricted` Pod Security Standard, and no way for a template to loosen it.

What a template may say of it is refused or accepted by api/security.py; here, once more, only what is known to be harmless is taken over.
What a template asks of its node elsewhere (hostPath, hostNetwork) is refused before there is a pod (plan/host_access.py).
"""

from typing import Any, Final

NON_ROOT: Final = 65532
"""User and group where neither image nor template names one: distroless' nonroot."""

_OF_A_CONTAINER: Final = ("runAsUser", "runAsGroup", "seLinuxOptions")
_OF_A_POD: Final = (
    *_OF_A_CONTAINER,
    "fsGroup",
    "fsGroupChangePolicy",
    "supplementalGroups",
    "supplementalGroupsPolicy",
)


def pod_security(template: dict[str, Any]) -> dict[str, Any]:
    """The pod's securityContext: the template's users and groups, under what it may not undo."""
    # fsGroup makes a new checkpoint volume writable for a user that is not root; OnRootMismatch spares a large one the walk at each start.
    defaults = {
        "runAsUser": NON_ROOT,
        "runAsGroup": NON_ROOT,
        "fsGroup": NON_ROOT,
        "fsGroupChangePolicy": "OnRootMismatch",
    }
    return {
        **defaults,
        **_taken_over(template, _OF_A_POD),
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security(template: dict[str, Any]) -> dict[str, Any]:
    """The securityContext of the trainer container."""
    return {**_taken_over(template, _OF_A_CONTAINER), **_restricted(), "readOnlyRootFilesystem": True}


def sidecar_security(template: dict[str, Any]) -> dict[str, Any]:
    """That of a template's own containers: restricted too, but with a root filesystem that they may need to write."""
    return {**_taken_over(template, (*_OF_A_CONTAINER, "readOnlyRootFilesystem")), **_restricted()}


def _taken_over(template: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    taken = {key: template[key] for key in keys if key in template}
    if taken.get("runAsUser") == 0:
        del taken["runAsUser"]
    if "seLinuxOptions" in taken:
        taken["seLinuxOptions"] = {key: value for key, value in taken["seLinuxOptions"].items() if key == "level"}
    return taken


def _restricted() -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
