"""What an operation of a group counts for each rank: the least that it needs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from disttrain_trainer.parallel.traffic import Traffic

PART, WHOLE = torch.zeros(10), torch.zeros(40)
PARTS = list(WHOLE.chunk(4))
ROOT = SimpleNamespace(rootRank=2)


@pytest.mark.parametrize(
    ("operation", "arguments", "root", "other"),
    [
        ("allreduce", ([WHOLE], None), (240, 240), (240, 240)),
        ("all_gather_single", (WHOLE, PART, None), (120, 120), (120, 120)),
        ("allgather", ([PARTS], [PART], None), (120, 120), (120, 120)),
        ("reduce_scatter_single", (PART, WHOLE, None), (120, 120), (120, 120)),
        ("all_to_all_single", (WHOLE, WHOLE, [], [], None), (120, 120), (120, 120)),
        ("broadcast", ([WHOLE], ROOT), (160, 0), (0, 160)),
        ("reduce", ([WHOLE], ROOT), (0, 160), (160, 0)),
        ("send", ([WHOLE], 1, 0), (160, 0), (160, 0)),
        ("recv", ([WHOLE], 1, 0), (0, 160), (0, 160)),
        ("barrier", (None,), (0, 0), (0, 0)),
    ],
)
def test_bytes_sent_and_received(
    operation: str, arguments: tuple[Any, ...], root: tuple[int, int], other: tuple[int, int]
) -> None:
    for rank, expected in ((2, root), (0, other)):
        traffic = Traffic()
        traffic.count(operation, rank, 4, arguments)
        assert (traffic.sent, traffic.received) == expected


@pytest.mark.parametrize(
    ("operation", "at_root", "elsewhere", "root", "other"),
    [
        ("gather", ([PARTS], [PART], ROOT), ([], [PART], ROOT), (0, 120), (40, 0)),
        ("scatter", ([PART], [PARTS], ROOT), ([PART], [], ROOT), (120, 0), (0, 40)),
    ],
)
def test_the_part_of_the_root_stays_where_it_is(
    operation: str, at_root: tuple[Any, ...], elsewhere: tuple[Any, ...], root: tuple[int, int], other: tuple[int, int]
) -> None:
    for rank, arguments, expected in ((2, at_root, root), (0, elsewhere, other)):
        traffic = Traffic()
        traffic.count(operation, rank, 4, arguments)
        assert (traffic.sent, traffic.received) == expected
