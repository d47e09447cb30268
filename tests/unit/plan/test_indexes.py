"""Sets of pod indexes as short text."""

import pytest

from disttrain.plan.indexes import format_indexes, parse_indexes


@pytest.mark.parametrize(
    ("indexes", "text"),
    [
        ((), ""),
        ((3,), "3"),
        ((0, 1, 2), "0-2"),
        ((5, 0, 2, 1), "0-2,5"),
        ((0, 2, 4), "0,2,4"),
        ((9, 10, 11, 13, 14), "9-11,13-14"),
    ],
)
def test_indexes_are_short_and_come_back(indexes, text):
    assert format_indexes(indexes) == text
    assert parse_indexes(text) == frozenset(indexes)
