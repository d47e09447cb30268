"""Which state a round begins from: the newest step of which every piece is held by some rank. Pure.

A piece is what the ranks of one place in the mesh hold a copy of. A replicated model is one piece, of which each rank has a copy.
"""

from collections.abc import Iterable, Mapping, Sequence


def newest(steps: Mapping[int, int], pieces: Iterable[Sequence[int]]) -> tuple[int, tuple[int, ...]]:
    """The newest step of which each piece has a holder, and the ranks whose state is of that step; (-1, ()) when there is none.

    steps: of the state of each rank, -1 for none. pieces: for each piece the ranks that hold copies of it.
    """
    held = [{steps[rank] for rank in ranks} for ranks in pieces]
    common = set[int].intersection(*held) - {-1} if held else set[int]()
    if not common:
        return -1, ()
    step = max(common)
    return step, tuple(sorted(rank for rank, own in steps.items() if own == step))
