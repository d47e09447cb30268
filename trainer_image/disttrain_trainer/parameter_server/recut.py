"""A server's shard from a checkpoint of another number of servers, or of another strategy: put together by the names of the tensors."""

import hashlib
import json
from pathlib import Path

from disttrain.api.tensor_index import UPDATES
from disttrain_trainer.checkpoint.by_name import PARAMETERS, NamedCheckpoint
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.model.flat import Layout, Vector
from disttrain_trainer.parameter_server.participation import Missed
from disttrain_trainer.parameter_server.shard_file import ShardFile

_DTYPES = {"F32": "float32", "F64": "float64", "BF16": "bfloat16", "F16": "float16"}


def load(folder: Path, *, server: int, servers: int, sync: bool, optimizer: str) -> ShardFile:
    """What the file of server `server` would hold if `servers` servers had written the checkpoint; in the host's memory.

    sync: a version is a step, and not a part. Raises WrongInput for a damaged checkpoint, and one in the middle of a step.
    """
    with NamedCheckpoint(folder) as checkpoint:
        checkpoint.require_whole_steps()
        layout = _layout(checkpoint)
        manifest, counts = checkpoint.manifest, checkpoint.updates()
        updates = max(counts.values(), default=manifest.step)
        tensors, missed = {}, []
        for number, span in enumerate(layout.spans(server=server, servers=servers)):
            places = checkpoint.places(number)
            slots = checkpoint.entry(places[0].name).slots.keys() - {UPDATES}
            for slot in (PARAMETERS, *sorted(slots)):
                values = checkpoint.vector(number, slot, span.start, span.stop)
                if values is not None:
                    # The state beside parameters of 16 bits has 32 here; a collective keeps it as it keeps the parameters.
                    wide = span.dtype.itemsize == 2 and slot != PARAMETERS
                    tensors[f"{number}.{slot}"] = values.float() if wide else values.to(span.dtype)
            if span.dtype.itemsize == 2:
                tensors.setdefault(f"{number}.master", tensors[f"{number}.{PARAMETERS}"].float())
            gone: Missed = tuple(
                (max(place.start, span.start) - span.start, min(place.stop, span.stop) - span.start, lost)
                for place in places
                if (lost := updates - counts.get(place.name, updates))
                and place.start < span.stop
                and place.stop > span.start
            )
            missed.append(gone)
    return ShardFile(
        layout=layout,
        server=server,
        servers=servers,
        version=manifest.step if sync else manifest.parts,
        applied=IndexSet.from_intervals([(0, manifest.parts)] if manifest.parts else []),
        optimizer=optimizer,
        updates=updates,
        missed=tuple(missed),
        tensors=tensors,
    )


def _layout(checkpoint: NamedCheckpoint) -> Layout:
    """The same as `Layout.of` the model."""
    lengths: dict[int, Vector] = {}
    described = []
    for place in checkpoint.layout.places:
        dtype = _DTYPES[checkpoint.entry(place.name).dtype]
        strides = () if place.strides is None else (place.strides,)
        described.append((place.name, dtype, place.shape, *strides))
        lengths[place.vector] = Vector(
            dtype=dtype, length=max(place.stop, getattr(lengths.get(place.vector), "length", 0))
        )
    return Layout(
        vectors=tuple(lengths[number] for number in sorted(lengths)),
        digest=hashlib.sha256(json.dumps(described).encode()).hexdigest(),
    )
