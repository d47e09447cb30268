"""Buffers and untrained parameters in a group that trains with parameter servers: those of a step, and those of a checkpoint.

Each rank has the buffers of its part of the model. What the servers keep of a step (Sync) are those of the whole model, which the first
rank hands in. It also has an outline of the whole model, from which the file of a checkpoint is written, and at the end the model.
"""

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from disttrain.api.tensor_index import FROZEN
from disttrain.api.tensor_index import Layout as Places
from disttrain_trainer.checkpoint import tensors
from disttrain_trainer.checkpoint.buffers import Buffers
from disttrain_trainer.checkpoint.by_name import NamedCheckpoint
from disttrain_trainer.checkpoint.manifest import NAME
from disttrain_trainer.checkpoint.tensor_file import Named
from disttrain_trainer.data.schedule import BatchPart
from disttrain_trainer.errors import PeerLost, UserError
from disttrain_trainer.model.flat import Vectors, trainable
from disttrain_trainer.model.part_buffers import PartBuffers
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.strategies.group_orders import Orders
from disttrain_trainer.strategies.group_values import of_place


class StepBuffers:
    """Those of one rank, from step to step. For one thread."""

    def __init__(
        self,
        model: nn.Module,
        orders: Orders,
        *,
        synchronous: bool,
        parts_per_step: int,
        there_are_some: bool,
        stages: int,
        gives: bool,
    ) -> None:
        """there_are_some: in the whole model, untrained parameters included. stages: of the pipeline, which have buffers each. gives: this
        rank speaks for its stage."""
        self._stages = stages
        self._gives = gives
        self._model = model
        self._orders = orders
        self._synchronous = synchronous
        self._parts_per_step = parts_per_step
        self._part = PartBuffers(model) if there_are_some else None
        self._holds_step: int | None = None
        self._left_for: int | None = None
        self._to_keep: bytes | None = None
        """What the first rank hands in with the next push."""

    def take(self, client: ShardedClient, step: int) -> bool:
        """Makes the buffers those of a step. False when a later step has taken its place. Raises PeerLost."""
        if self._part is None:
            return True
        if not self._synchronous:
            self._part.begin()
            return True
        if self._holds_step == step:
            self._part.restore()
            return True
        if self._left_for == step:
            self._part.advance()
        else:
            found = client.fetch_buffers(step)
            if found is None:
                return False
            if found:
                self._part.take(found, own=True)
        self._part.begin()
        self._holds_step = step
        return True

    def leave(self, part: BatchPart) -> None:
        """After a part. Every rank must call it: what part 0 leaves is collected."""
        self._to_keep = None
        if self._part is None:
            return
        number = part.index % self._parts_per_step
        self._part.left(step=part.step, part=number)
        if (name := self._part.changed_frozen) is not None:
            raise UserError(
                f"parameter {name}, which is not trained, is changed by the training: strategy Hybrid with parameterServer does not keep "
                "that yet; register it as a buffer, or use dataParallel in place of parameterServer"
            )
        if not number and self._synchronous:
            self._to_keep = self._whole(self._part.encoded())
            self._left_for = part.step + 1

    def keep(self, client: ShardedClient, part: BatchPart) -> None:
        """Before the push of a part: the first rank hands in what part 0 has left. Raises PeerLost."""
        if self._to_keep is not None and self._orders.leads:
            client.keep_buffers(part.step, self._to_keep)

    def collect(self) -> Named:
        """The buffers of the whole model as they are now. Every rank must call it."""
        own = {name: value.contiguous() for name, value in tensors.buffers_of(self._model).items()}
        return safetensors.torch.load(self._whole(safetensors.torch.save(own)))

    def forget(self) -> None:
        """Another round: what was known of steps is void."""
        self._holds_step = self._left_for = self._to_keep = None

    def _whole(self, own: bytes) -> bytes:
        if self._stages == 1:
            return own
        found: dict[str, torch.Tensor] = {}
        for encoded in self._orders.collect(own if self._gives else b""):
            if encoded:
                found |= safetensors.torch.load(encoded)
        return safetensors.torch.save(found)


class Outline:
    """The whole model without the values that the servers have. For the first rank of a group."""

    def __init__(self, model: nn.Module, places: Places, root: Path | None) -> None:
        """model: of the factory's, which it takes over."""
        self.module = model
        self._places = places
        self._saved = Buffers(model, root, places)
        for _, parameter in trainable(model):
            parameter.data = parameter.data.new_empty(0)

    def put(self, values: Named) -> None:
        """Takes over these buffers."""
        own = {name: value for name, value in values.items() if not name.startswith(FROZEN)}
        tensors.put_buffers(self.module, own, source="the step")

    def put_encoded(self, encoded: bytes) -> None:
        """Takes over what the servers kept."""
        self.put(safetensors.torch.load(encoded))

    def restore(self, file: str) -> None:
        """Takes over a file of a checkpoint. Raises PeerLost, WrongInput."""
        self._saved.restore(file)

    def save(self, folder: str) -> Callable[[], dict[str, object]]:
        """See Buffers.save."""
        return self._saved.save(folder)

    def fill(self, vectors: Vectors) -> nn.Module:
        """The whole model, whose trained parameters have these values. They share the vectors' memory."""
        named = dict(self.module.named_parameters())
        for place in self._places.places:
            named[place.name].data = of_place(vectors[place.vector], place)
        return self.module


def restore(model: ShardedModel, root: Path | None, file: str) -> None:
    """This rank's buffers and untrained parameters, of the checkpoint that has this file. Raises PeerLost when it is gone; WrongInput."""
    if root is None:
        return
    folder = (root / file).parent
    if not (folder / NAME).exists():
        raise PeerLost(folder.name, "a newer checkpoint took its place")
    with NamedCheckpoint(folder) as checkpoint:
        there = checkpoint.manifest.tensors
        for piece in model.pieces:
            if piece.number < 0 and piece.name in there:
                piece.local.copy_(checkpoint.block(checkpoint.entry(piece.name), piece.block))
        own = tensors.buffers_of(model.module)
        tensors.put_buffers(
            model.module, {name: checkpoint.tensor(name) for name in own if name in there}, source=str(folder)
        )
