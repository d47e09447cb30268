"""What a template asks of its pod's node: its files, its network, its processes. Such a job gets no pods, unless the operator may grant it.

A namespace without a Pod Security label lets every pod have them, and a pod is made with the operator's rights, not with those of the job's
author. Privileges, capabilities and most ports of the node are refused with the job itself (api/security.py, api/pod_parts.py).
"""

from collections.abc import Iterator

from disttrain.api.names import Role
from disttrain.api.spec import DistTrainJobSpec
from disttrain.api.template import PodSpec
from disttrain.plan.view import JobView

_OF_A_POD = ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "nodeName")
_OWNERS = {Role.MASTER: "master", Role.PARAMETER_SERVER: "parameterServer", Role.WORKER: "worker"}


def asked_for(spec: DistTrainJobSpec) -> tuple[str, ...]:
    """The fields of the templates that reach for the node, by their paths from spec downwards."""
    return tuple(
        f"{owner}.template.spec.{field}"
        for role, owner in _OWNERS.items()
        if (pod := spec.template_of(role).spec) is not None
        for field in _fields(pod)
    )


def refused(view: JobView) -> str:
    """Why the job gets no pods, and what to do; "" where the operator may grant it, or it asks for nothing of the node."""
    if view.snapshot.allows_host_access or not (fields := asked_for(view.spec)):
        return ""
    return (
        f"Pods may not reach into their nodes: {', '.join(fields)}; take them out of the template, "
        "or have the operator started with --allow-host-access"
    )


def _fields(pod: PodSpec) -> Iterator[str]:
    extra = pod.model_extra or {}
    yield from (field for field in _OF_A_POD if extra.get(field))
    for number, volume in enumerate(pod.volumes or ()):
        if (volume.model_extra or {}).get("hostPath") is not None:
            yield f"volumes[{number}].hostPath"
    for number, container in enumerate(pod.init_containers or ()):
        ports = (container.model_extra or {}).get("ports")
        if any(isinstance(port, dict) and port.get("hostPort") for port in (ports if isinstance(ports, list) else ())):
            yield f"initContainers[{number}].ports"
