"""A round begins from the newest step of which every piece of the model is held by some rank."""

from disttrain_trainer.coordinator.newest import newest

SQUARE = ((0, 2), (1, 3))
"""Two copies of two pieces: ranks 0 and 1 hold one, 2 and 3 the other."""


def test_the_copy_of_a_lost_rank_is_enough() -> None:
    assert newest({0: 7, 1: -1, 2: 7, 3: 7}, SQUARE) == (7, (0, 2, 3))


def test_a_step_that_one_piece_lacks_is_not_taken_though_it_is_newer() -> None:
    assert newest({0: 8, 1: 7, 2: 7, 3: 7}, SQUARE) == (7, (1, 2, 3))


def test_there_is_none_when_a_piece_is_lost_or_the_pieces_are_of_different_steps() -> None:
    assert newest({0: 7, 1: -1, 2: 7, 3: -1}, SQUARE) == (-1, ())
    assert newest({0: 8, 1: 7, 2: 8, 3: 7}, SQUARE) == (-1, ())


def test_of_a_whole_model_the_newest_rank_is_enough() -> None:
    assert newest({0: -1, 1: 5, 2: 6}, [(0, 1, 2)]) == (6, (2,))
