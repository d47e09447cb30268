"""Which group of trainer.optimizer.groups a parameter is in. Pure.

Group 0 is that of the parameters that no match names; group k + 1 that of trainer.optimizer.groups[k]. The first match wins.
"""

import re
from collections.abc import Iterable, Sequence

from disttrain.api.optimizer import Optimizer as Settings
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.flat import Place

Groups = tuple[tuple[tuple[int, int], ...], ...]
"""For each vector of a layout: (element behind the last one, group) of its runs, in order, which cover it. Empty: all in group 0."""


def group_of(settings: Settings, name: str) -> int:
    """The group of the parameter of this name. Call `check` before: a match may be no regular expression."""
    for number, group in enumerate(settings.groups, start=1):
        if re.search(group.match, name):
            return number
    return 0


def check(settings: Settings, names: Iterable[str]) -> None:
    """Raises WrongInput for a match that is no regular expression, or that matches none of the model's parameters. names: of the whole
    model's, frozen ones too."""
    known = list(names)
    for number, group in enumerate(settings.groups):
        field = f"trainer.optimizer.groups[{number}].match"
        try:
            pattern = re.compile(group.match)
        except (re.error, OverflowError, RecursionError) as error:
            raise WrongInput(f"{field}: {group.match!r} is no regular expression: {error}") from None
        if not any(pattern.search(name) for name in known):
            raise WrongInput(
                f"{field}: {group.match!r} matches no parameter of the model, whose names are {', '.join(known[:5])}"
                + (f" and {len(known) - 5} more" if len(known) > 5 else "")
            )


def groups_of(settings: Settings, places: Sequence[Place]) -> Groups:
    """The groups of the elements of a layout, whose parameters lie at these places."""
    if not settings.groups:
        return ()
    vectors: list[list[tuple[int, int]]] = [[] for _ in range(1 + max(place.vector for place in places))]
    for place in places:
        runs, group = vectors[place.vector], group_of(settings, place.name)
        if runs and runs[-1][1] == group:
            runs.pop()
        runs.append((place.stop, group))
    return tuple(map(tuple, vectors))


def covers(groups: Groups, *, lengths: Sequence[int], count: int) -> bool:
    """Whether the groups are those of vectors of these lengths, and numbered below count. For what a peer says."""
    if not groups:
        return True
    return len(groups) == len(lengths) and all(
        bool(runs)
        and [stop for stop, _ in runs] == sorted({stop for stop, _ in runs})
        and runs[0][0] > 0
        and runs[-1][0] == length
        and all(0 <= group < count for _, group in runs)
        for runs, length in zip(groups, lengths, strict=True)
        if runs or length
    )


def within(groups: Groups, *, vector: int, start: int, stop: int) -> tuple[tuple[int, int, int], ...]:
    """(start, stop, group) of the runs between two elements of a vector, counted from the first of them."""
    if not groups:
        return ((0, stop - start, 0),)
    found, begin = [], 0
    for end, group in groups[vector]:
        low, high = max(begin, start), min(end, stop)
        if low < high:
            found.append((low - start, high - start, group))
        begin = end
    return tuple(found)
