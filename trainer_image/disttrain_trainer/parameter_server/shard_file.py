"""A shard in a file: safetensors, so that reading it cannot run code; written so that a crash leaves the old file or the new one.

The header's metadata says which version and parts, which layout and optimiser. The digest of the file, which a checkpoint's manifest holds
and `load` compares, is what `save` returns: it is taken as the bytes are written.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from disttrain.api import digests
from disttrain_trainer.checkpoint import tensor_file
from disttrain_trainer.checkpoint.tensors import is_finite
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.flat import Layout, Vector
from disttrain_trainer.parameter_server.participation import Missed

FORMAT = "disttrain-shard-2"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """What a shard's file holds."""

    layout: Layout
    server: int
    servers: int
    version: int
    applied: IndexSet
    optimizer: str
    """Name of the optimiser whose state this is."""
    updates: int
    """Steps that it has taken."""
    missed: tuple[Missed, ...] = ()
    """For each vector, the steps in which elements took no part; empty where all took part in all of them."""
    tensors: dict[str, torch.Tensor] = field(repr=False)
    """By "<number of the vector>.<what>", unpadded."""

    def is_finite(self) -> bool:
        """Whether every parameter is a number. The optimiser's state may hold what it likes, as long as that holds."""
        return all(is_finite(tensor) for name, tensor in self.tensors.items() if name.endswith(".parameters"))

    def save(self, path: Path) -> str:
        """Writes the file and returns its digest. When it returns, the file survives a crash of the machine. Raises OSError."""
        metadata = {
            "format": FORMAT,
            "layout": json.dumps(
                {"digest": self.layout.digest, "vectors": [(v.dtype, v.length) for v in self.layout.vectors]}
            ),
            "server": json.dumps([self.server, self.servers]),
            "version": str(self.version),
            "applied": json.dumps(self.applied.intervals()),
            "optimizer": json.dumps([self.optimizer, self.updates]),
        }
        if any(self.missed):
            metadata["missed"] = json.dumps(self.missed)
        path.parent.mkdir(parents=True, exist_ok=True)
        return tensor_file.write(path, self.tensors, metadata)

    @classmethod
    def load(cls, path: Path, digest: str | None = None) -> "ShardFile":
        """Reads and checks the file; WrongInput that names it when it is missing, damaged, or no shard.

        digest: what the manifest says of the file; None: nothing.
        """
        try:
            if digest is not None and (found := digests.of(path, like=digest)) != digest:
                raise WrongInput(f"shard {path} is damaged: its digest is {found}, not {digest}")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if metadata.get("format") != FORMAT:
                raise WrongInput(f"{path} is no shard: its format is {metadata.get('format')!r}, not {FORMAT!r}")
            layout = json.loads(metadata["layout"])
            server, servers = json.loads(metadata["server"])
            optimizer, updates = json.loads(metadata["optimizer"])
            result = cls(
                layout=Layout(
                    digest=layout["digest"],
                    vectors=tuple(Vector(dtype=dtype, length=length) for dtype, length in layout["vectors"]),
                ),
                server=server,
                servers=servers,
                version=int(metadata["version"]),
                applied=IndexSet.from_intervals((start, stop) for start, stop in json.loads(metadata["applied"])),
                optimizer=optimizer,
                updates=updates,
                missed=tuple(
                    tuple((int(start), int(stop), int(count)) for start, stop, count in part)
                    for part in json.loads(metadata.get("missed", "[]"))
                ),
                tensors=tensors,
            )
        except OSError as error:
            raise WrongInput(f"shard {path} cannot be read: {error}") from error
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise WrongInput(f"shard {path} is damaged: {error}") from error
        return result
