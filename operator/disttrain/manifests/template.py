"""A role's pod template merged with what the operator makes: lists by name, as a strategic merge patch does. Not here: what we make."""

from collections.abc import Iterable
from typing import Any

from disttrain.api.names import TRAINER_CONTAINER
from disttrain.manifests.security import sidecar_security

Object = dict[str, Any]


def merge_by(key: str, *layers: Iterable[Object]) -> list[Object]:
    """Lists of objects in one; of two with the same key the later one counts, in the place of the first."""
    merged: dict[str, Object] = {}
    for layer in layers:
        for item in layer:
            merged[item[key]] = item
    return list(merged.values())


def ports_of(template: Iterable[Object], own: Iterable[Object]) -> list[Object]:
    """The template's ports and ours; where they speak of the same number and protocol, ours counts."""
    ours = {_port_key(port): port for port in own}
    return [*(port for port in template if _port_key(port) not in ours), *ours.values()]


def _port_key(port: Object) -> tuple[int, str]:
    return port["containerPort"], port.get("protocol", "TCP")


def split_containers(pod_spec: Object) -> tuple[Object, list[Object]]:
    """The template's trainer container ({} when it has none), and its other containers as sidecars."""
    trainer: Object = {}
    sidecars = []
    for container in pod_spec.get("containers", []):
        if container["name"] == TRAINER_CONTAINER:
            trainer = container
        else:
            # A native sidecar (KEP-753): it runs as long as the trainer does, and does not keep a finished pod alive.
            sidecars.append(restricted({**container, "restartPolicy": "Always"}))
    return trainer, sidecars


def restricted(container: Object) -> Object:
    """A container of the template with the security settings that every container has."""
    return {**container, "securityContext": sidecar_security(container.get("securityContext", {}))}
