"""spec.data and spec.checkpoint: what lies on volumes. Not here: checkpoint.from (origin.py)."""

import re
from typing import Annotated

from pydantic import Field, StrictInt

from disttrain.api.base import Model, Rule
from disttrain.api.names import CHECKPOINT_PATH, CODE_PATH
from disttrain.api.origin import Origin
from disttrain.api.types import INT32_MAX, AbsolutePath, DnsSubdomain


class Encryption(Model):
    """Encryption of the data at rest."""

    secret_name: DnsSubdomain
    """Secret with the AES-256 key."""


class Volume(Model):
    """A PersistentVolumeClaim of the job's namespace."""

    persistent_volume_claim: DnsSubdomain
    """Name of the claim; every pod of the job mounts it."""


_TAKEN_PATHS = f"^(/tmp|/dev|/proc|/sys|{CHECKPOINT_PATH}|{CODE_PATH})(/|$)"


class DataVolume(Volume):
    """A PersistentVolumeClaim with data."""

    RULES = (
        Rule(
            cel=f"!self.path.matches('{_TAKEN_PATHS}')",
            check=lambda volume: re.match(_TAKEN_PATHS, volume.path) is None,
            message="must not lie at or below /tmp, /dev, /checkpoints, /disttrain/code, /proc and /sys, which every pod has already",
            field="path",
            shows="path",
        ),
        Rule(
            cel="!self.path.contains(':')",
            check=lambda volume: ":" not in volume.path,
            message="must not contain a colon",
            field="path",
            shows="path",
        ),
    )
    path: AbsolutePath = "/data"
    """Where it is mounted, read-only. Default: /data."""


class Data(Model):
    """Where the data lies and how it is handed out."""

    partitions: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    """Ranges handed out to the workers; every sample exactly once an epoch, through faults and resizes."""
    replication: Annotated[StrictInt, Field(ge=1, le=16)] = 1
    """Workers that hold a copy of each partition. Default: 1."""
    encryption: Encryption | None = None
    """AES-256-GCM at rest, with a key from a Secret."""
    volume: DataVolume | None = None
    """Claim with the data, mounted into every pod."""


class Checkpoint(Model):
    """Where and how often the state of the training is kept."""

    volume: Volume
    """Claim that every pod of the job can mount. Each job has a folder of its own there, DISTTRAIN_CHECKPOINT_DIR."""
    every_steps: Annotated[StrictInt, Field(ge=1, le=INT32_MAX)] = 100
    """Steps between two checkpoints, and the most that a lost server costs. Default: 100."""
    keep: Annotated[StrictInt, Field(ge=1, le=1000)] = 3
    """Checkpoints that are kept; older ones are removed. Default: 3."""
    from_: Annotated[Origin | None, Field(alias="from")] = None
    """Another job of the namespace, perhaps deleted, with its checkpoints on the same claim: this one starts from its newest good one.
    NAME: tensors by name, step 0, new optimiser state. Or an object: job (its name), step (default: the newest), include (Model, or
    All: also optimiser state, step and order of the data; default: Model), uid (of several jobs of the name; default: the newest). It
    is read once, before this job has a checkpoint of its own. Default: a new model."""
