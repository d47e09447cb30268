"""The rules between data and the rest of the spec: a packed data set, and where a volume is mounted."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from disttrain.api.base import Rule
from disttrain.api.names import TRAINER_CONTAINER, Role
from disttrain.api.storage import PACKED, Data

if TYPE_CHECKING:
    from disttrain.api.spec import DistTrainJobSpec


def _mounts_elsewhere(role: str) -> str:
    """CEL: the trainer container of a role's template has no mount of its own where the data is."""
    template = f"self.{role}.template"
    return (
        f"(!has(self.{role}) || !has({template}) || !has({template}.spec) || !has({template}.spec.containers) || "
        f"{template}.spec.containers.all(c, c.name != '{TRAINER_CONTAINER}' || !has(c.volumeMounts) || "
        "c.volumeMounts.all(m, m.mountPath != self.data.volume.path)))"
    )


def _mounts(spec: "DistTrainJobSpec") -> set[str]:
    """Where the templates' trainer containers have mounts of their own."""
    return {
        mount.mount_path
        for role in Role
        for container in spec.template_of(role).containers
        if container.name == TRAINER_CONTAINER
        for mount in container.volume_mounts or ()
    }


def _only_packed(field: str, cel: str, used: Callable[[Data], bool], *, shows: str = "") -> Rule:
    """A field of data that has a meaning for a packed data set alone. cel, used: whether it asks for anything. shows: a part of it."""
    return Rule(
        cel=f"!has(self.data) || !({cel}) || (has(self.trainer.dataset) && self.trainer.dataset == '{PACKED}')",
        check=lambda s: s.data is None or not used(s.data) or s.trainer.dataset == PACKED,
        message=f"is of a packed data set: pack it with `disttrain data pack`, and set trainer.dataset to {PACKED}",
        field=f"data.{field}",
        shows=f"data.{field}{shows}",
    )


RULES = (
    Rule(
        cel="!has(self.data) || !has(self.data.volume) || "
        + " && ".join(map(_mounts_elsewhere, ("master", "parameterServer", "worker"))),
        check=lambda s: s.data is None or s.data.volume is None or s.data.volume.path not in _mounts(s),
        message="the trainer container of a template has a mount of its own there; choose another path",
        field="data.volume.path",
        shows="data.volume.path",
    ),
    Rule(
        cel=f"!has(self.trainer.dataset) || self.trainer.dataset != '{PACKED}' || "
        "(has(self.data) && (has(self.data.volume) || has(self.data.url)))",
        check=lambda s: s.trainer.dataset != PACKED or (s.data is not None and bool(s.data.volume or s.data.url)),
        message="reads what `disttrain data pack` wrote: set data.volume to the claim, or data.url to the place, that has it",
        field="trainer.dataset",
        shows="trainer.dataset",
    ),
    _only_packed("partitions", "has(self.data.partitions)", lambda data: data.partitions is not None),
    _only_packed("url", "has(self.data.url)", lambda data: data.url is not None),
    _only_packed("replication", "self.data.replication > 1", lambda data: data.replication > 1),
    _only_packed(
        "encryption", "has(self.data.encryption)", lambda data: data.encryption is not None, shows=".secretName"
    ),
    Rule(
        cel="!has(self.data) || self.data.replication <= 1 || self.data.replication <= self.worker.replicas",
        check=lambda s: s.data is None or s.data.replication <= max(1, s.worker.replicas),
        message="must be at most worker.replicas: each keeps one copy",
        field="data.replication",
        shows="data.replication",
    ),
)
"""Of a DistTrainJobSpec."""
