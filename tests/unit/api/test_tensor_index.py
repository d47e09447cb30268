"""A block of a tensor is found again among the elements of the whole."""

import pytest

from disttrain.api.tensor_index import Block, Piece


def elements(piece: Piece) -> list[int]:
    """Of the whole tensor, in the order in which the file holds them."""
    runs = list(piece.runs())
    assert [run.offset for run in runs] == [number * piece.length for number in range(piece.count)]
    return [element for run in runs for element in range(run.start, run.start + run.length)]


@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (1, 3), (3, 2), (5, 1)])
def test_the_blocks_of_a_matrix_hold_each_element_once(rows: int, columns: int) -> None:
    whole = Block.whole((4, 6))
    blocks = [
        whole.cut(0, parts=rows, number=row).cut(1, parts=columns, number=column)
        for row in range(rows)
        for column in range(columns)
    ]
    found = [element for block in blocks if block.elements for element in elements(block.piece("f", "k"))]
    assert sorted(found) == list(range(24))


def test_a_block_of_columns_lies_in_one_run_a_row() -> None:
    block = Block.whole((2, 3, 4)).cut(2, parts=2, number=1)
    assert elements(block.piece("f", "k")) == [2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23]
    assert block.piece("f", "k") == Piece(file="f", key="k", start=2, length=2, count=6, stride=4)


def test_the_first_parts_of_a_cut_are_filled_first() -> None:
    parts = [Block.whole((4, 2)).cut(0, parts=3, number=number).sizes for number in range(3)]
    assert parts == [(2, 2), (2, 2), (0, 2)]


def test_a_piece_of_one_run_is_written_as_older_releases_read_it() -> None:
    assert Piece(file="f", key="k", length=2).model_dump().keys() == {"file", "key", "offset", "start", "length"}
