"""One server's part of the model: parameters, optimiser state and version, updated block by block.

One thread at a time calls a shard. `consistency.py` decides what becomes an update, `shard_host.py` locks, `shard_file.py` writes files.
There are two ways to keep the parameters, by `history`:

- False: updated in place. A reader may see a part of an update that is being made (as in Hogwild).
- True: each version is another buffer, and the previous version stays. A shard that is one version ahead can then still serve the
  version that the other shards have, to a worker that computes a lost part of it again. No shard is ever two ahead: gradients for a step
  need the parameters of that version from all shards.

Parameters of 16 bits have a 32-bit master, on which gradients are summed and the optimiser works; what workers read is rounded from it.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from disttrain_trainer.checkpoint.background import HostCopy
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.flat import Layout, Span, bytes_of
from disttrain_trainer.model.parameter_groups import Groups, covers
from disttrain_trainer.parameter_server.block_update import BlockUpdate
from disttrain_trainer.parameter_server.optimizer import PADDING, Optimizer
from disttrain_trainer.parameter_server.participation import Missed, Took, after
from disttrain_trainer.parameter_server.shard_file import ShardFile
from disttrain_trainer.parameter_server.squares import Squares, nodes_of
from disttrain_trainer.runtime.memory import zeros

_PREVIOUS = "previous"
"""The name of the parameters of the version before in a snapshot."""
BLOCK = 1 << 18
"""Elements that are summed, updated and rounded at a time: they stay in the core's cache from one to the next."""


class Buffers:
    """A gradient, or the parameters of one version: a padded tensor for each span, and its unpadded bytes for the network."""

    __slots__ = ("parts", "readers", "retired", "spans", "version", "views")

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        # The content of the padding is never read.
        self.parts = [zeros(-(-span.length // PADDING) * PADDING, span.dtype) for span in spans]
        self.views = [bytes_of(part[: span.length]) for part, span in zip(self.parts, spans, strict=True)]
        self.version = 0
        self.readers = 0
        self.retired = False


class _Sum:
    """The sum of some gradients: scale x the values, which are in `wide` where they have 16 bits and were added to or stepped with."""

    __slots__ = ("buffers", "scale", "wide")

    def __init__(self, buffers: Buffers, scale: float) -> None:
        self.buffers = buffers
        self.scale = scale
        self.wide: list[torch.Tensor | None] | None = None

    def block(self, number: int, block: slice, *, widen: bool = False) -> torch.Tensor:
        """The values of a block. widen: its 32 bits have no values yet."""
        part = self.buffers.parts[number][block]
        wide = None if self.wide is None else self.wide[number]
        if wide is None:
            return part
        if widen:
            wide[block].copy_(part)
        return wide[block]


class Shard:
    """The part number `server` of `servers` of a model of this layout. Not thread-safe."""

    def __init__(self, *, layout: Layout, server: int, servers: int, optimizer: Optimizer, history: bool) -> None:
        self.layout = layout
        self.spans = layout.spans(server=server, servers=servers)
        self.initialized = False
        """Whether the parameters have their first values."""
        self.version = 0
        """Optimiser steps behind the current parameters."""
        self._place = (server, servers)
        self._optimizer = optimizer
        self._history = history
        self._free: list[Buffers] = []
        self._current = Buffers(self.spans)
        self._previous: Buffers | None = None
        self._sums: dict[int, _Sum] = {}
        """Gradients, and sums of them, each under its first part."""
        self._missed: list[Missed] = [() for _ in self.spans]
        """The updates in which elements took no part."""
        parts = self._current.parts
        self._masters = [_wide(part) for part in parts]
        self._update = BlockUpdate(self.spans, self._masters, optimizer, history=history)
        self._free_wide: list[list[torch.Tensor | None]] = []
        """Vectors of 32 bits, in which gradients of 16 are summed."""
        self._sum_spans = tuple(
            replace(span, dtype=torch.float32) if span.dtype.itemsize == 2 else span for span in self.spans
        )
        self._sums_are_wide = self._sum_spans != self.spans
        self._free_sums: list[Buffers] = []
        self.last_scale = 1.0
        """What the sum of the last step was multiplied by."""
        optimizer.bind(
            [part if master is None else master for part, master in zip(parts, self._masters, strict=True)], block=BLOCK
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters as workers read them, which are those of a gradient."""
        return sum(span.nbytes for span in self.spans)

    def assign(self, groups: Groups) -> None:
        """The groups of the model's elements, by which rule each is updated. WrongInput when they are not those of this layout."""
        lengths = [vector.length for vector in self.layout.vectors]
        if self._optimizer.groups == 1:
            return  # with local steps they are the workers' own
        if not covers(groups, lengths=lengths, count=self._optimizer.groups) or not groups:
            raise WrongInput(f"the groups are not those of a model of {lengths} elements")
        self._update.groups = groups

    def take(self) -> Buffers:
        """Buffers to receive into, with any content. Hand them back: to `give`, `initialize` or `absorb`."""
        return self._free.pop() if self._free else Buffers(self.spans)

    def give(self, buffers: Buffers) -> None:
        """Takes back buffers that are not needed."""
        self._free.append(buffers)

    def take_sum(self) -> Buffers:
        """Buffers for the sum of a step, in the dtypes in which gradients are summed, with any content. Hand them back: to `give_sum` or
        `follow`."""
        if not self._sums_are_wide:
            return self.take()
        return self._free_sums.pop() if self._free_sums else Buffers(self._sum_spans)

    def give_sum(self, buffers: Buffers) -> None:
        """Takes back buffers that are not needed."""
        (self._free_sums if self._sums_are_wide else self._free).append(buffers)

    def follow(self, part: int, summed: Buffers, *, scale: float, rate: float, took: Took) -> None:
        """The step that another shard took with this sum of gradients, of which `absorb` gave it a copy: the same bits."""
        own = _Sum(self.take() if self._sums_are_wide else summed, scale)
        if self._sums_are_wide:
            self._widen(own)
            for number, values in enumerate(summed.parts):
                wide = None if own.wide is None else own.wide[number]
                (own.buffers.parts[number] if wide is None else wide).copy_(values)
            self.give_sum(summed)
        self._sums[part] = own
        self.absorb((), update=part, took=took, rate=rate)

    def initialize(self, values: Buffers) -> None:
        """Takes these buffers as the first parameters; the caller must not use them afterwards."""
        for part, master in zip(values.parts, self._masters, strict=True):
            if master is not None:
                master.copy_(part)
        values.version = self.version
        self._free.append(self._current)
        self._current = values
        self.initialized = True

    def hold(self, part: int, gradient: Buffers, weight: float) -> None:
        """Keeps the gradient of a part, which counts as gradient x weight, until `absorb` adds it to another or takes a step with it."""
        self._sums[part] = _Sum(gradient, weight)

    def absorb(
        self,
        additions: Sequence[tuple[int, int]],
        *,
        update: int | None,
        divisor: float = 1.0,
        took: Took = None,
        rate: float = 1.0,
        factor: float = 1.0,
        measure: bool = False,
        copy: Buffers | None = None,
    ) -> float | None:
        """For each (a, b) of `additions`, in this order, adds the sum held under part b to that under part a. Then, unless `update` is
        None, takes an optimiser step with the sum held under that part, to a new version. A part may hold nothing.

        divisor, factor: what the sum is divided by, and multiplied by, before. took: the elements that the step changes. rate: what the
        learning rate is multiplied by. copy: of `take_sum`, gets the sum that it steps with.
        The sum of no gradients is no step of the optimizer; with history it is a new version of the same values. `measure`: returns the
        squared norm of the sum that it steps with.
        """
        work = self._prepare(additions)
        total = None if update is None else self._sums.pop(update, None)
        if total is None and update is not None and self._history:
            self._publish_unchanged()
        if not work and total is None:
            return None
        first_alone = total is not None and self._widen(total)
        squared = 0.0
        plain = took is None and not any(self._missed) and not self._update.groups
        scale = 1.0 if total is None else total.scale / divisor * factor
        for number, part in enumerate(self._current.parts):
            for start in range(0, part.numel(), BLOCK):
                block = slice(start, min(start + BLOCK, part.numel()))
                for left, right, before, weight, first in work:
                    into = left.block(number, block, widen=first)
                    if before != 1.0:
                        into.mul_(before)
                    into.add_(right.block(number, block), alpha=weight)
                if total is None:
                    continue
                gradient = total.block(number, block, widen=first_alone)
                following = total.buffers.parts[number][block]
                if copy is not None:
                    copy.parts[number][block].copy_(gradient)
                if measure:
                    own = gradient[: max(0, self.spans[number].length - start)]  # without the padding
                    squared += float(torch.linalg.vector_norm(own)) ** 2
                if plain:
                    self._update.whole(number, block, part, gradient, following, scale=scale, rate=rate)
                else:
                    taking = ((0, self.spans[number].length),) if took is None else took[number]
                    segments = self._update.segments(number, block, self._missed[number], taking)
                    self._update.some(number, block, segments, part, gradient, following, scale=scale, rate=rate)
        for _, right, *_ in work:
            self._free.append(right.buffers)
            self._narrow(right)
        if total is None:
            return None
        self._narrow(total)
        self.last_scale = scale
        self._optimizer.advance()
        if took is not None or any(self._missed):
            self._count_misses(took)
        self.version += 1
        self._publish(total.buffers)
        return squared * scale**2 if measure else None

    def squares(self, part: int) -> Squares:
        """Of the sum that is held under this part: the squared norm of what lies here of it, to be added up over all shards."""
        found = self._sums.get(part)
        if found is None:
            return Squares(nodes=[[] for _ in self.spans], scale=1.0)
        nodes = []
        for number, span in enumerate(self.spans):
            edges = [*range(0, span.length, BLOCK), span.length]
            blocks = (found.block(number, slice(start, stop)) for start, stop in pairwise(edges))
            nodes.append(nodes_of(blocks, span.start))
        return Squares(nodes=nodes, scale=found.scale)

    def _prepare(self, additions: Sequence[tuple[int, int]]) -> list[tuple["_Sum", "_Sum", float, float, bool]]:
        """The additions that there is something to do for: left, right, what left is multiplied with before, right's weight, and whether
        left gets its 32 bits now."""
        work = []
        for a, b in additions:
            right = self._sums.pop(b, None)
            if right is None:
                continue
            left = self._sums.setdefault(a, right)
            if left is right:
                continue
            # Equal weights are left to the optimizer, which has to multiply anyway: a pass over the sum less. What is multiplied when
            # follows from the gradients and the order of `additions` alone, so that the sum is bitwise the same however they arrive.
            before = weight = 1.0
            if left.scale != right.scale:
                before, weight, left.scale = left.scale, right.scale, 1.0
            work.append((left, right, before, weight, self._widen(left)))
        return work

    def _widen(self, summed: "_Sum") -> bool:
        """Gives a sum memory of 32 bits beside its 16; False when it has some already."""
        if summed.wide is not None:
            return False
        summed.wide = self._free_wide.pop() if self._free_wide else [_wide(part) for part in summed.buffers.parts]
        return True

    def _narrow(self, summed: "_Sum") -> None:
        if summed.wide is not None:
            self._free_wide.append(summed.wide)

    def acquire(self, version: int | None) -> Buffers:
        """The parameters of that version if they are here, else the current ones. They do not change until `release`."""
        wanted = self._previous if self._previous is not None and self._previous.version == version else self._current
        wanted.readers += 1
        return wanted

    def release(self, buffers: Buffers) -> None:
        """The end of a read."""
        buffers.readers -= 1
        self._recycle(buffers)

    def snapshot(self, applied: IndexSet, memory: HostCopy, *, previous: bool = False) -> ShardFile:
        """A copy of the current version in this memory, to be written while the shard goes on. `applied`: the parts in it. previous: with
        the parameters of the version before, where there is one: another shard may not have this one yet."""
        tensors = {
            f"{number}.{name}": tensor[: span.length]
            for number, span in enumerate(self.spans)
            for name, tensor in self._tensors(number).items()
        }
        if previous and self._previous is not None:
            before = zip(self._previous.parts, self.spans, strict=True)
            tensors |= {f"{number}.{_PREVIOUS}": part[: span.length] for number, (part, span) in enumerate(before)}
        server, servers = self._place
        return ShardFile(
            layout=self.layout,
            server=server,
            servers=servers,
            version=self.version,
            applied=applied.copy(),
            optimizer=self._optimizer.name,
            updates=self._optimizer.updates,
            missed=tuple(self._missed),
            tensors=memory.take(tensors),
        )

    def restore(self, file: ShardFile) -> None:
        """Goes on from a file. WrongInput when it is of another model, another cut or another optimiser."""
        self._check(file)
        for number, span in enumerate(self.spans):
            for name, tensor in self._tensors(number).items():
                saved = file.tensors.get(f"{number}.{name}")
                if saved is None or saved.dtype != tensor.dtype or saved.shape != (span.length,):
                    raise WrongInput(
                        f"the saved shard has no {name} of {span.length} x {tensor.dtype} for vector {number}"
                    )
                tensor[: span.length].copy_(saved)
        if f"0.{_PREVIOUS}" in file.tensors:
            self._previous = self.take()
            self._previous.version = file.version - 1
            for number, (part, span) in enumerate(zip(self._previous.parts, self.spans, strict=True)):
                part[: span.length].copy_(file.tensors[f"{number}.{_PREVIOUS}"])
        self.version = self._current.version = file.version
        self._optimizer.updates = file.updates
        self._missed = list(file.missed) or [() for _ in self.spans]
        self.initialized = True

    def _check(self, file: ShardFile) -> None:
        if file.layout != self.layout:
            raise WrongInput(
                f"the saved shard is of another model: its layout is {file.layout.digest[:12]} with "
                f"{[v.length for v in file.layout.vectors]} elements, the model's {self.layout.digest[:12]} with "
                f"{[v.length for v in self.layout.vectors]}"
            )
        if (file.server, file.servers) != self._place:
            raise WrongInput(
                f"the saved shard is number {file.server} of {file.servers}; this is server {self._place[0]} of {self._place[1]}"
            )
        if file.optimizer != self._optimizer.name:
            raise WrongInput(f"the saved shard was trained with {file.optimizer}; the job names {self._optimizer.name}")

    def _tensors(self, number: int) -> dict[str, torch.Tensor]:
        """Everything that one vector's part consists of."""
        master = self._masters[number]
        return {
            "parameters": self._current.parts[number],
            **({} if master is None else {"master": master}),
            **self._optimizer.state()[number],
        }

    def _count_misses(self, took: Took) -> None:
        for number, span in enumerate(self.spans):
            intervals = ((0, span.length),) if took is None else took[number]
            self._missed[number] = after(self._missed[number], intervals, span.length)

    def _publish_unchanged(self) -> None:
        """A step whose parts all have no gradient: the version before stays readable, and the new one has its values."""
        buffers = self.take()
        for new, old in zip(buffers.parts, self._current.parts, strict=True):
            new.copy_(old)
        self.version += 1
        self._publish(buffers)

    def _publish(self, buffers: Buffers) -> None:
        if not self._history:
            self._current.version = self.version
            self._free.append(buffers)
            return
        buffers.version = self.version
        oldest, self._previous, self._current = self._previous, self._current, buffers
        if oldest is not None:
            oldest.retired = True
            self._recycle(oldest)

    def _recycle(self, buffers: Buffers) -> None:
        # A slow worker may still be reading an old version: its memory is used again when the last reader is done.
        if buffers.retired and not buffers.readers:
            buffers.retired = False
            self._free.append(buffers)


def _wide(part: torch.Tensor) -> torch.Tensor | None:
    """A vector of 32 bits beside one of 16."""
    return zeros(len(part), torch.float32) if part.dtype.itemsize == 2 else None
