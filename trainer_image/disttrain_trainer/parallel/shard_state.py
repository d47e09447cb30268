"""The state of one rank of a sharded model as named tensors: kept over rounds, given to the rank that takes a copy, saved and loaded.

model.<name>      a parameter's block, or a buffer whole, by the names of state_dict() of the whole model
<slot>.<name>     the same block of the optimiser's state, such as mean.<name>; number:<slot>.<name> has no blocks (factory_optimizer.py)
updates           steps that each trained parameter has taken, float32; in a file updates.<name> with one number
"""

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from disttrain.api.mesh import Mesh
from disttrain.api.tensor_index import (
    BLOCKS,
    LAYOUT,
    MODEL,
    OWN_NUMBER,
    OWN_STATE,
    UPDATES,
    Block,
    Blocks,
    Entry,
    Layout,
)
from disttrain_trainer.checkpoint import resuming, tensor_file, tensors
from disttrain_trainer.checkpoint.by_name import NamedCheckpoint
from disttrain_trainer.checkpoint.tensor_file import Named
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.parallel.hand_over import hand_over
from disttrain_trainer.parallel.shard_factory import ShardFactoryOptimizer
from disttrain_trainer.parallel.shard_optimizer import ShardOptimizer
from disttrain_trainer.parallel.sharded_model import ShardedModel

PROTOCOL = 1
"""What ranks of a sharded model exchange. Ranks of two releases that differ in it must not join one round."""


def check(model: nn.Module) -> None:
    """Raises WrongInput, which names it, for a tensor of the whole model that can be neither saved nor sent."""
    tensors.check_buffers(model)
    tensors.check_extra_state(model)
    tensors.check_parameters(dict(model.named_parameters()))


def digest_of(model: nn.Module, layout: Layout, mesh: Mesh) -> str:
    """The same for every rank that can train with this one: protocol, mesh, names, types, shapes, what is trained. model: the whole."""
    named = {**dict(model.named_parameters()), **tensors.buffers_of(model)}
    shapes = sorted((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in named.items())
    trained = [place.name for place in layout.places]
    return hashlib.sha256(repr((PROTOCOL, mesh.shape, shapes, trained)).encode()).hexdigest()


class ShardState:
    """What one rank must hold to go on at a step."""

    def __init__(
        self,
        model: ShardedModel,
        optimizer: ShardOptimizer | ShardFactoryOptimizer,
        layout: Layout,
        *,
        keeps_buffers: bool,
    ) -> None:
        """layout: of the whole model. keeps_buffers: this rank saves the buffers of its part of the model."""
        self._model = model
        self._optimizer = optimizer
        self._layout = layout
        self._keeps_buffers = keeps_buffers
        self._blocks = {piece.name: piece.block for piece in model.pieces}

    def present(self) -> dict[str, torch.Tensor]:
        """All tensors by name. They share the model's memory."""
        return {
            **{f"{MODEL}{piece.name}": piece.local for piece in self._model.pieces},
            **self._slots(),
            **self._by_factory(),
            UPDATES: self._optimizer.updates,
            **{f"{MODEL}{name}": buffer for name, buffer in self._buffers().items()},
        }

    def take(self, values: Named, *, source: str) -> None:
        """Takes over what `present` of another process, or of this one in another round, returned. Raises WrongInput."""
        own = self.present()
        buffers = {f"{MODEL}{name}" for name in self._buffers()}
        kept = [name for name in own if name not in buffers and not _is_own(name)]
        tensors.take_over({name: own[name] for name in kept}, values, source=source)
        if isinstance(self._optimizer, ShardFactoryOptimizer):
            self._optimizer.take({name: value for name, value in values.items() if _is_own(name)}, source=source)
        self._put_buffers(
            {name.removeprefix(MODEL): value for name, value in values.items() if name in buffers}, source=source
        )

    def receive(self, *, source: int, step: int, device: torch.device, group: dist.ProcessGroup) -> None:
        """Takes over the state of the rank `source`, which all ranks of the group hold copies of. Every one of them must call it.

        Raises BrokenGroup when a peer is lost: then this state is of no step, except on the source.
        """
        buffers = {f"{MODEL}{name}" for name in self._buffers()}
        _, values = hand_over(
            self.present(),
            source=source,
            step=step,
            device=device,
            in_place=lambda name: name not in buffers and not _is_own(name),
            group=group,
        )
        if dist.get_rank() != source:
            self.take(values, source=f"the state of worker-{source}")

    def blocks_of(self, copy: Named) -> dict[str, torch.Tensor]:
        """Of what `present` returned, or of a copy of it: what this rank writes to its file."""
        own = [piece for piece in self._model.pieces if piece.is_owner]
        found = {f"{MODEL}{piece.name}": copy[f"{MODEL}{piece.name}"] for piece in own}
        for number, piece in enumerate(self._model.trained):
            if piece.is_owner:
                found |= {f"{slot}.{piece.name}": copy[f"{slot}.{piece.name}"] for slot in self._optimizer.slots}
                if len(copy[UPDATES]):
                    found[f"{UPDATES}.{piece.name}"] = copy[UPDATES][number : number + 1]
        names = {piece.name for piece in own}
        found |= {key: tensor for key, tensor in copy.items() if _is_own(key) and key.partition(".")[2] in names}
        if self._keeps_buffers:
            found |= {f"{MODEL}{name}": copy[f"{MODEL}{name}"] for name in self._buffers()}
        return found

    def write(self, path: Path, copy: Named) -> str:
        """Writes this rank's file from what `present` returned, or a copy of it; its sha256 in hex. Raises OSError."""
        written = self.blocks_of(copy)
        blocks = {}
        for key, tensor in written.items():
            name = key.partition(".")[2]
            blocks[name] = self._blocks.get(name) or Block.whole(tuple(tensor.shape))
        metadata = {
            LAYOUT: self._layout.model_dump_json(by_alias=True, exclude_defaults=True),
            BLOCKS: Blocks(blocks=blocks).model_dump_json(by_alias=True),
        }
        return tensor_file.write(path, written, metadata)

    def load(self, folder: Path, *, model_only: bool = False, source: str = "") -> None:
        """Takes over this rank's blocks of a checkpoint, of whichever strategy. Raises WrongInput when it is damaged, or of another model.

        model_only: without the optimiser's state. source: whose checkpoint it is, for messages.
        """
        source = source or str(folder)
        with NamedCheckpoint(folder) as checkpoint:
            if not model_only:
                checkpoint.require_whole_steps()
                self._require_trained(checkpoint, source)
            with torch.no_grad():
                for piece in self._model.pieces:
                    entry = self._entry(checkpoint, piece.name, piece.block, piece.local, source)
                    piece.local.copy_(checkpoint.block(entry, piece.block))
                if not model_only:
                    self._load_optimizer(checkpoint, source)
            parameters = {name for name, _ in self._model.module.named_parameters(remove_duplicate=False)}
            own = self._buffers().keys() - parameters
            self._put_buffers(
                {name: checkpoint.tensor(name) for name in own if name in checkpoint.manifest.tensors}, source=source
            )

    def _load_optimizer(self, checkpoint: NamedCheckpoint, source: str) -> None:
        if isinstance(self._optimizer, ShardFactoryOptimizer):
            kept: dict[str, torch.Tensor] = {}
            for piece in self._model.trained:
                kept |= checkpoint.own_state(piece.name, piece.block)
            self._optimizer.take(kept, source=source)
        counts = checkpoint.updates() if len(self._optimizer.updates) else {}
        for number, piece in enumerate(self._model.trained):
            entry = checkpoint.entry(piece.name)
            for slot, values in self._optimizer.slots.items():
                if (stored := entry.slots.get(slot)) is None:
                    raise WrongInput(
                        f"trainer.optimizer: {source} has no {slot} of {piece.name}: it is of another optimizer; set the one that "
                        "the checkpoint was written with, or begin from its model alone by checkpoint.from with include: Model"
                    )
                values[number].copy_(checkpoint.block(stored, piece.block))
            if counts:
                self._optimizer.updates[number] = float(counts[piece.name])

    def _entry(self, checkpoint: NamedCheckpoint, name: str, block: Block, local: torch.Tensor, source: str) -> Entry:
        entry = checkpoint.entry(name)
        there, here = (entry.dtype, entry.shape), (tensor_file.name_of(local.dtype), block.shape)
        if there != here:
            raise WrongInput(
                f"trainer.model: {source} has another model: {name} is {there[0]} {list(there[1])} there, {here[0]} {list(here[1])} here: "
                "make trainer.model that one, or begin with an empty checkpoint volume"
            )
        return entry

    def _require_trained(self, checkpoint: NamedCheckpoint, source: str) -> None:
        then, now = ({place.name for place in layout.places} for layout in (checkpoint.layout, self._layout))
        if changed := sorted(then ^ now):
            raise WrongInput(
                f"trainer.model: {source} is of another training: not the same parameters are trained: {resuming.listed(changed)}; "
                "set requires_grad as then, or begin from its model alone by checkpoint.from with include: Model"
            )

    def _slots(self) -> dict[str, torch.Tensor]:
        return {
            f"{slot}.{piece.name}": tensor
            for slot, values in self._optimizer.slots.items()
            for piece, tensor in zip(self._model.trained, values, strict=True)
        }

    def _by_factory(self) -> dict[str, torch.Tensor]:
        return self._optimizer.named_state() if isinstance(self._optimizer, ShardFactoryOptimizer) else {}

    def _buffers(self) -> dict[str, torch.Tensor]:
        return tensors.buffers_of(self._model.module)

    def _put_buffers(self, values: Named, *, source: str) -> None:
        own = self._buffers()
        tensors.put_buffers(
            self._model.module, {name: value for name, value in values.items() if name in own}, source=source
        )


def _is_own(key: str) -> bool:
    """Whether it is a state of an optimizer of the user's own."""
    return key.startswith((OWN_STATE, OWN_NUMBER))
