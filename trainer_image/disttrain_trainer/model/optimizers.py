"""torch's fused optimisers on flat vectors: one kernel a vector, instead of some for each parameter.

A parameter that took no part in a step is left as it is, with its state and its count of steps, as torch.optim leaves one whose gradient
is None. Then the vectors are updated in runs: neighbours of one group that took part, and that took part as often as each other before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from disttrain.api.optimizer import Optimizer as Settings
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.parameter_groups import group_of
from disttrain_trainer.model.update_rule import rules_of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Neighbours in one vector that are updated as one."""

    vector: int
    group: int
    elements: slice | None
    """Of the vector; None: all of them."""
    places: tuple[int, ...]
    """Numbers of the parameters."""
    updates: torch.Tensor
    """Steps that each of them has taken, of no dimension."""


class FlatOptimizer:
    """The job's optimiser over a model's vectors, with the numbers and defaults of torch.optim.SGD, Adam and AdamW."""

    def __init__(self, settings: Settings, model: FlatModel) -> None:
        self._rules = rules_of(settings)
        self._rule = self._rules[0]
        self._vectors = list(model.parameters)
        self._places = model.places
        self._groups = [group_of(settings, place.name) for place in self._places]
        self._slots = {slot: [torch.zeros_like(vector) for vector in self._vectors] for slot in self._rule.slots}
        self._counts = [0] * len(self._places)
        """Steps that each parameter had taken when `_runs` was made."""
        self._divide(None)

    def state(self) -> dict[str, list[torch.Tensor]]:
        """One tensor for each vector, by slot; the tensors themselves. But `updates` is a copy, with an element for each parameter of the
        vector: give it back to `restore`."""
        if not self._rule.is_adaptive:
            return dict(self._slots)
        counts = self._counted()
        updates = [
            # Named: user code may choose other defaults.
            torch.tensor(
                [count for count, place in zip(counts, self._places, strict=True) if place.vector == number],
                dtype=torch.float32,
                device="cpu",
            )
            for number in range(len(self._vectors))
        ]
        return {**self._slots, "updates": updates}

    def restore(self, updates: Sequence[torch.Tensor]) -> None:
        """After the tensors of `state` were changed. updates: of a vector, or of no dimension where they are all the same."""
        if self._rule.is_adaptive:
            values = [iter(tensor.expand(self._numbers_in(number)).tolist()) for number, tensor in enumerate(updates)]
            self._counts = [int(next(values[place.vector])) for place in self._places]
        self._divide(None)

    def step(
        self, gradients: Sequence[torch.Tensor], took_part: list[bool] | None = None, *, rate: float = 1.0
    ) -> None:
        """Updates the vectors in place. took_part: for each parameter, whether it had a gradient; None: all had. rate: what the learning
        rate is multiplied by."""
        if took_part != self._took:
            self._counts = self._counted()
            self._divide(took_part)
        with torch.no_grad():
            for rule, runs, updates in self._by_rule:
                rule.step(
                    _parts(self._vectors, runs),
                    _parts(gradients, runs),
                    {slot: _parts(tensors, runs) for slot, tensors in self._slots.items()},
                    updates,
                    rate=rate,
                )

    def _numbers_in(self, vector: int) -> int:
        return sum(place.vector == vector for place in self._places)

    def _counted(self) -> list[int]:
        """Steps that each parameter has taken."""
        if not self._rule.is_adaptive:
            return self._counts
        counts = list(self._counts)
        for run in self._runs:
            count = int(run.updates.item())
            for number in run.places:
                counts[number] = count
        return counts

    def _divide(self, took_part: list[bool] | None) -> None:
        """Sets what a step with these parameters updates. Once for many steps: each microsecond is half a per cent of a small model's."""
        self._took, self._runs = took_part, self._cut(took_part)
        by_group = [[run for run in self._runs if run.group == group] for group in range(len(self._rules))]
        self._by_rule = [
            (rule, runs, [run.updates for run in runs])
            for rule, runs in zip(self._rules, by_group, strict=True)
            if runs
        ]

    def _cut(self, took_part: list[bool] | None) -> list[_Run]:
        runs: list[list[int]] = []
        newest: dict[int, list[int]] = {}
        for number, place in enumerate(self._places):
            if took_part is not None and not took_part[number]:
                newest.pop(place.vector, None)
                continue
            run = newest.get(place.vector)
            if run is None or self._kind(run[-1]) != self._kind(number):
                run = newest[place.vector] = []
                runs.append(run)
            run.append(number)
        return [self._run(run) for run in runs]

    def _kind(self, number: int) -> tuple[int, int]:
        """What neighbours must have in common to be updated as one."""
        return self._groups[number], self._counts[number]

    def _run(self, numbers: list[int]) -> _Run:
        first, last = self._places[numbers[0]], self._places[numbers[-1]]
        vector = self._vectors[first.vector]
        updates = vector.new_tensor(float(self._counts[numbers[0]]), dtype=torch.float32)
        return _Run(
            vector=first.vector,
            group=self._groups[numbers[0]],
            elements=None if last.stop - first.start == vector.numel() else slice(first.start, last.stop),
            places=tuple(numbers),
            updates=updates,
        )


def _parts(vectors: Sequence[torch.Tensor], runs: Sequence[_Run]) -> list[torch.Tensor]:
    return [vectors[run.vector] if run.elements is None else vectors[run.vector][run.elements] for run in runs]
