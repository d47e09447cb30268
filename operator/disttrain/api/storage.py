"""spec.data and spec.checkpoint: what lies on volumes. Not here: checkpoint.from (origin.py)."""

import re
from typing import Annotated, Final

from pydantic import Field, StrictInt, StringConstraints

from disttrain.api.base import Model, Rule
from disttrain.api.course import KeepBest
from disttrain.api.names import CHECKPOINT_PATH, OWN_PATH
from disttrain.api.origin import Origin
from disttrain.api.types import INT32_MAX, AbsolutePath, DnsSubdomain

PACKED: Final = "disttrain_trainer.data:packed"
"""The factory of trainer.dataset that reads what `disttrain data pack` wrote: partitions, encryption and replication are of such data."""
KEY_OF_SECRET: Final = "key"
"""The entry of the Secret of data.encryption."""


class Encryption(Model):
    """Encryption of the data at rest."""

    secret_name: DnsSubdomain
    """Secret with the AES-256 key of `disttrain data pack --key`, in its entry `key`: 32 bytes, also in hex or base64. Only the workers
    get it, as a file."""


class Volume(Model):
    """A PersistentVolumeClaim of the job's namespace."""

    persistent_volume_claim: DnsSubdomain
    """Name of the claim; every pod of the job mounts it."""


_TAKEN_PATHS = f"^(/tmp|/dev|/proc|/sys|{CHECKPOINT_PATH}|{OWN_PATH})(/|$)"


class DataVolume(Volume):
    """A PersistentVolumeClaim with data."""

    RULES = (
        Rule(
            cel=f"!self.path.matches('{_TAKEN_PATHS}')",
            check=lambda volume: re.match(_TAKEN_PATHS, volume.path) is None,
            message=f"must not lie at or below /tmp, /dev, /proc, /sys, {CHECKPOINT_PATH} and {OWN_PATH}, which pods have already",
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


Url = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9+.:-]*://[!\"$->@-~]+$", max_length=2048)]
"""A URL as fsspec takes it, also a chain such as simplecache::s3://bucket; in printable ASCII, and without a query or a fragment."""
_PASSWORD = "//[^/]*:[^/]*@"


class Data(Model):
    """Where the data lies, and how a packed data set is kept."""

    RULES = (
        Rule(
            cel="!has(self.url) || !has(self.volume)",
            check=lambda data: data.url is None or data.volume is None,
            message="set volume or url: a data set has one place",
            field="url",
            shows="url",
        ),
        Rule(
            cel=f"!has(self.url) || !self.url.matches('{_PASSWORD}')",
            check=lambda data: data.url is None or re.search(_PASSWORD, data.url) is None,
            message="must not hold a password, which everyone who may read the job would see: put it into the Secret of urlSecretName",
            field="url",
            shows="url",
        ),
        Rule(
            cel="!has(self.urlSecretName) || has(self.url)",
            check=lambda data: data.url_secret_name is None or data.url is not None,
            message="is the Secret of a URL: set data.url, too",
            field="urlSecretName",
            shows="urlSecretName",
        ),
    )

    partitions: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    """Files of the packed data set, as `disttrain data pack --partitions` wrote them. Default: as many as there are."""
    replication: Annotated[StrictInt, Field(ge=1, le=16)] = 1
    """Above 1: workers that keep a copy of each partition of a packed data set on their disks, as it is stored, and read from one
    another; the volume is the last resort. Default: 1, all read from the volume."""
    encryption: Encryption | None = None
    """The key of an encrypted packed data set: AES-256-GCM at rest, on the volume and on the workers' disks."""
    volume: DataVolume | None = None
    """Claim with the data, mounted into every pod."""
    url: Url | None = None
    """Instead of a volume: where the folder of `disttrain data pack` lies, as fsspec names it, such as s3://bucket/prefix. The workers
    read it; their image has the library of the protocol, such as s3fs."""
    url_secret_name: DnsSubdomain | None = None
    """Secret whose entries are fsspec's options for the URL, such as key, secret and endpoint_url of s3; one that begins with { or [ is
    JSON. Only the workers get it, as files. Default: none."""


class Checkpoint(Model):
    """Where and how often the state of the training is kept."""

    volume: Volume
    """Claim that every pod of the job can mount. Each job has a folder of its own there, DISTTRAIN_CHECKPOINT_DIR."""
    every_steps: Annotated[StrictInt, Field(ge=1, le=INT32_MAX)] = 100
    """Steps between two checkpoints, and the most that a lost server costs. Default: 100."""
    keep: Annotated[StrictInt, Field(ge=1, le=1000)] = 3
    """Checkpoints that are kept; older ones are removed. Default: 3."""
    keep_best: KeepBest | None = None
    """Beside these the one whose evaluation is the best is kept. Default: none."""
    from_: Annotated[Origin | None, Field(alias="from")] = None
    """Another job of the namespace, perhaps deleted, with its checkpoints on the same claim: this one starts from its newest good one.
    NAME: tensors by name, step 0, new optimiser state. Or an object: job (its name), step (default: the newest), include (Model, or
    All: also optimiser state, step and order of the data; default: Model), uid (of several jobs of the name; default: the newest). It
    is read once, before this job has a checkpoint of its own. Default: a new model."""
