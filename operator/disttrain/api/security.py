"""What a pod template may say of security: nothing that loosens the `restricted` Pod Security Standard.

Closed on purpose: a field that is not here is refused, a later Kubernetes' too, where it would have to be dropped in silence.
What every pod gets is in manifests/security.py.
"""

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, StringConstraints

from disttrain.api.base import Model
from disttrain.api.types import INT32_MAX

UserId = Annotated[StrictInt, Field(ge=1, le=INT32_MAX)]
GroupId = Annotated[StrictInt, Field(ge=0, le=INT32_MAX)]


class SeccompProfile(Model):
    """System calls that a container may make."""

    type: Literal["RuntimeDefault"]
    """RuntimeDefault, which every container has."""


class SeLinuxOptions(Model):
    """SELinux label of a container."""

    level: Annotated[str, StringConstraints(max_length=253)]
    """Level, such as s0:c123,c456."""


class Capabilities(Model):
    """Capabilities of a container: none."""

    drop: Annotated[tuple[Annotated[str, StringConstraints(max_length=63)], ...], Field(max_length=64)] | None = None
    """What is dropped; ALL in any case."""


class SecurityContext(Model):
    """Security of a container: only what keeps it restricted."""

    run_as_user: UserId | None = None
    """User that it runs as, never 0. Default: that of the pod."""
    run_as_group: GroupId | None = None
    """Group that it runs as. Default: that of the pod."""
    run_as_non_root: Literal[True] | None = None
    """true, for every container."""
    privileged: Literal[False] | None = None
    """false, for every container."""
    allow_privilege_escalation: Literal[False] | None = None
    """false, for every container."""
    read_only_root_filesystem: StrictBool | None = None
    """Whether it can write to its image's files; always true for `trainer`."""
    capabilities: Capabilities | None = None
    """None are left to any container."""
    seccomp_profile: SeccompProfile | None = None
    """RuntimeDefault, for every container."""
    se_linux_options: SeLinuxOptions | None = None
    """Level of the SELinux label."""


class PodSecurityContext(Model):
    """Security of a pod: users, groups, and only what keeps it restricted."""

    run_as_user: UserId | None = None
    """User of the containers, never 0. Default: 65532."""
    run_as_group: GroupId | None = None
    """Group of the containers. Default: 65532."""
    run_as_non_root: Literal[True] | None = None
    """true, for every pod."""
    fs_group: GroupId | None = None
    """Group that owns the volumes. Default: 65532."""
    fs_group_change_policy: Literal["OnRootMismatch", "Always"] | None = None
    """When the owner of a volume's files is set. Default: OnRootMismatch."""
    supplemental_groups: Annotated[tuple[GroupId, ...], Field(max_length=64)] | None = None
    """Further groups of the containers."""
    supplemental_groups_policy: Literal["Merge", "Strict"] | None = None
    """Whether the image's own groups are added."""
    seccomp_profile: SeccompProfile | None = None
    """RuntimeDefault, for every pod."""
    se_linux_options: SeLinuxOptions | None = None
    """Level of the SELinux label."""
