"""The state of a model and its optimiser as named tensors: to be saved, loaded, and sent to the other ranks."""

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from disttrain.api.tensor_index import (
    EXTRA_JSON,
    LAYOUT,
    MODEL,
    OWN_NUMBER,
    OWN_STATE,
    UPDATES,
    Block,
    Layout,
    read_header,
)
from disttrain_trainer.checkpoint import composite, tensor_file, tensors
from disttrain_trainer.checkpoint.by_name import NamedCheckpoint
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.factory_optimizer import FactoryOptimizer
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.parallel.hand_over import hand_over

PROTOCOL = 2
"""What ranks exchange in a step and in the hand-over of a state. Ranks of two releases that differ in it must not join one round: their
sums
would be wrong without a word."""

_UPDATES = f".{UPDATES}"


class RankState:
    """What a rank must hold to go on at a step: parameters, the optimiser's state, and the buffers that `state_dict()` has.

    Parameters and optimiser are the same everywhere, by name and shape. Buffers may change their shapes as the model trains: a rank that
    takes them over takes their shapes, too.
    """

    def __init__(
        self, model: nn.Module, optimizer: FlatOptimizer | FactoryOptimizer, layout: Layout | None = None
    ) -> None:
        """layout: how the parameters lie in the optimiser's vectors, for the files."""
        self._model = model
        self._optimizer = optimizer
        self._layout = layout
        self._metadata = {LAYOUT: layout.model_dump_json(by_alias=True, exclude_defaults=True)} if layout else {}
        self._parameters = {f"{MODEL}{name}": parameter.detach() for name, parameter in model.named_parameters()}
        everything = self.present()
        shapes = sorted(
            (
                name,
                str(tensor.dtype),
                () if name.endswith(EXTRA_JSON) or composite.is_part(name) else tuple(tensor.shape),
            )
            for name, tensor in everything.items()
        )
        trained = [place.name for place in layout.places] if layout else []
        self.layout = hashlib.sha256(repr((PROTOCOL, shapes, trained)).encode()).hexdigest()
        """The same for every rank that this rank can train with: protocol, names, types, shapes, what is trained, before any training."""

    def check(self) -> None:
        """Raises WrongInput, which names it, for a tensor that can be neither saved nor sent."""
        tensors.check_buffers(self._model)
        tensors.check_extra_state(self._model)
        tensors.check_parameters(dict(self._model.named_parameters()))

    def present(self) -> dict[str, torch.Tensor]:
        """All tensors by name: `model.<name>` as in state_dict(), `optimizer.<vector>.<slot>` one-dimensional, and those of
        FactoryOptimizer. They share the model's memory, except the optimiser's counts of steps, which are copies."""
        buffers = {f"{MODEL}{name}": buffer for name, buffer in tensors.buffers_of(self._model).items()}
        return {**self._parameters, **self._slots(), **self._by_factory(), **buffers}

    def begin_again(self, first: nn.Module) -> None:
        """The parameters are the first ones again: so are the buffers, the parameters that are not trained, and the optimiser's state.

        first: a model that the same factory made.
        """
        tensors.put_frozen(tensors.frozen_of(self._model), tensors.frozen_of(first), source="trainer.model")
        tensors.copy_buffers(self._model, first)
        slots = self._slots()
        for tensor in slots.values():
            tensor.zero_()
        if isinstance(self._optimizer, FactoryOptimizer):
            self._optimizer.take({}, source="trainer.model")
        self._optimizer.restore([slots[name] for name in slots if name.endswith(_UPDATES)])

    def write(self, path: Path, tensors: tensor_file.Named) -> str:
        """Writes what `present` returned, or a copy of it, to a file; its digest. Raises OSError."""
        return tensor_file.write(path, tensors, self._metadata)

    def load(self, path: Path) -> None:
        """Takes over a file's values. Raises WrongInput when it is damaged, or of another model."""
        values = tensor_file.read(path)
        if (described := read_header(path).metadata.get(LAYOUT)) is not None:
            self._require_places(Layout.model_validate_json(described), values, source=str(path))
        slots = self._slots()
        for name in slots:
            if name.endswith(_UPDATES) and name in values:  # older releases counted once for all parameters
                values[name] = values[name].expand(slots[name].shape)
        self._take(values, slots, source=str(path))

    def load_by_name(self, folder: Path) -> None:
        """Takes over a checkpoint of parameter servers. Raises WrongInput when it is damaged, or of another model."""
        with NamedCheckpoint(folder) as checkpoint:
            checkpoint.require_whole_steps()
            values = {f"{MODEL}{name}": checkpoint.whole(name) for name in checkpoint.untrained}
            for place in checkpoint.layout.places:
                flat = checkpoint.in_memory_order(place)
                values[f"{MODEL}{place.name}"] = (
                    flat.view(place.shape) if place.strides is None else flat.as_strided(place.shape, place.strides)
                )
            self._require_places(checkpoint.layout, values, source=str(folder))
            counts, slots = checkpoint.updates(), self._slots()
            for name, tensor in slots.items():
                _, number, slot = name.split(".")
                if slot == UPDATES:
                    values[name] = torch.tensor([float(counts[p.name]) for p in checkpoint.places(int(number))])
                elif (saved := checkpoint.vector(int(number), slot, 0, len(tensor))) is not None:
                    values[name] = saved.to(tensor.dtype)
            for place in checkpoint.layout.places:
                values |= checkpoint.own_state(place.name, Block.whole(place.shape))
        self._take(
            {name: tensor.detach() for name, tensor in self._frozen().items()} | values, slots, source=str(folder)
        )

    def _require_places(self, layout: Layout, values: tensor_file.Named, *, source: str) -> None:
        """Raises WrongInput when the parameters of this model lay in other places: the optimiser's state is kept by places alone.

        values: what is there, by name. A model of other names or shapes is left to `_take`.
        """
        if self._layout is None:
            return
        then, now = ({place.name: place for place in one.places} for one in (layout, self._layout))
        both = self._parameters.keys() & values.keys()
        if changed := [name for name in sorted(then.keys() ^ now.keys()) if f"{MODEL}{name}" in both]:
            there, here = ("trained", "frozen") if changed[0] in then else ("frozen", "trained")
            what = f"parameter {changed[0]} is {there} there, {here} (requires_grad) here"
        elif then.keys() == now.keys() and all(then[name].shape == now[name].shape for name in now) and then != now:
            moved = next(name for name in now if then[name] != now[name])
            what = f"parameter {moved} has another place or memory format (channels_last) there, as in a model made in another order"
        else:
            return
        raise WrongInput(
            f"trainer.model: {source} is of another training: {what}; this is immutable once a job has checkpoints: change it back to go "
            "on, or start a new job with the model of this one (checkpoint.from). No checkpoint was changed"
        )

    def _frozen(self) -> dict[str, torch.Tensor]:
        """The parameters that are not trained: a checkpoint of servers lacks those that no file can hold."""
        return {f"{MODEL}{name}": p for name, p in self._model.named_parameters() if not p.requires_grad}

    def broadcast(self, *, source: int, step: int, device: torch.device) -> int:
        """Copies the state of the rank `source` to every rank, and returns its step. Every rank of the group must call it; blocks.

        device: where the backend sends from. Raises BrokenGroup when a peer is lost: then any rank but the source may hold a mixture of two
        states. Raises WrongInput when the source has another model.
        """
        step, values = hand_over(
            self.present(),
            source=source,
            step=step,
            device=device,
            in_place=lambda name: name in self._parameters or name.startswith("optimizer."),
        )
        if dist.get_rank() != source:
            self._take(values, self._slots(), source=f"the state of worker-{source}")
        return step

    def _by_factory(self) -> dict[str, torch.Tensor]:
        return self._optimizer.named_state() if isinstance(self._optimizer, FactoryOptimizer) else {}

    def _slots(self) -> dict[str, torch.Tensor]:
        return {
            f"optimizer.{number}.{slot}": tensor
            for slot, vectors in self._optimizer.state().items()
            for number, tensor in enumerate(vectors)
        }

    def _take(self, values: dict[str, torch.Tensor], slots: dict[str, torch.Tensor], *, source: str) -> None:
        by_factory = {name: values.pop(name) for name in list(values) if name.startswith((OWN_STATE, OWN_NUMBER))}
        present = {**self._parameters, **slots}
        tensors.take_over(present, values, source=source)
        for name in sorted(values.keys() - present.keys()):
            if not name.startswith(MODEL):
                raise tensors.another_model(source, name, values[name], None)
        buffers = {name.removeprefix(MODEL): value for name, value in values.items() if name not in present}
        tensors.put_buffers(self._model, buffers, source=source)
        if isinstance(self._optimizer, FactoryOptimizer):
            self._optimizer.take(by_factory, source=source)
        self._optimizer.restore([slots[name] for name in slots if name.endswith(_UPDATES)])
