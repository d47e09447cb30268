"""The lines of a history: written, read back, thinned, and what a fall back undoes."""

import pytest

from disttrain.api.history import Event, EventType, Header, Point, decode, kept, merged, thinned


def point(step: int, *, loss: float | None = 1.0, seconds: float = 1.0, **more: object) -> Point:
    return Point(step=step, time=100.0 + step, seconds=seconds, loss=loss, **more)  # type: ignore[arg-type]


def test_a_line_says_after_reading_what_was_written() -> None:
    lines = (
        Header("digits", "default", "u", 0.5),
        point(3, epoch=1, samples_per_second=12.5, gradient_norm=0.25, staleness=2, workers=4, values={"a": 0.5}),
        Event(EventType.CHECKPOINT, 5.25, 3),
        Event(EventType.START, 5.25, details={"attempt": 2}),
    )
    assert tuple(decode(line.encode()) for line in lines) == lines


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"step":3,"time":1', id="cut"),
        pytest.param("", id="empty"),
        pytest.param("\x00\xff", id="no JSON"),
        pytest.param("[1]", id="no object"),
        pytest.param('{"step":-1,"time":1}', id="a negative step"),
        pytest.param('{"step":true,"time":1}', id="a step that is no number"),
        pytest.param('{"step":1}', id="no time"),
        pytest.param('{"step":1e999,"time":1}', id="an infinite step"),
        pytest.param('{"event":"end","time":"now"}', id="an event at no time"),
        pytest.param("[" * 100_000, id="deeper than a reader can go"),
    ],
)
def test_a_line_that_is_none_is_passed_over(text: str) -> None:
    assert decode(text) is None


def test_numbers_of_another_type_are_left_out_of_a_point() -> None:
    read = decode('{"step":1,"time":2,"loss":"<b>","values":{"a":1,"b":"x"},"phases":[1],"epoch":NaN}')
    assert read == Point(step=1, time=2.0, seconds=0.0, values={"a": 1.0})


def test_a_fall_back_undoes_the_points_behind_it_and_no_event() -> None:
    saved = Event(EventType.CHECKPOINT, 1.0, 2)
    back = Event(EventType.FALL_BACK, 2.0, 2)
    assert kept([point(1), point(2), saved, point(3), point(4), back, point(4, loss=9)]) == [
        point(1),
        point(2),
        saved,
        back,
        point(4, loss=9),
    ]


def test_of_two_points_at_one_step_the_newer_counts() -> None:
    assert kept([point(1), point(2), point(2, loss=5)]) == [point(1), point(2, loss=5)]


def test_two_points_become_their_mean_weighted_by_time() -> None:
    one = point(1, loss=1.0, seconds=1, values={"a": 1.0}, phases={"data": 0.5})
    two = point(2, loss=4.0, seconds=2, values={"b": 2.0}, phases={"data": 0.25})
    both = merged(one, two)
    assert (both.step, both.seconds, both.loss) == (2, 3.0, 3.0)
    assert both.values == {"a": 1.0, "b": 2.0}
    assert both.phases == {"data": 0.75}
    assert merged(point(1, loss=None), two).loss == 4.0


def test_thinning_halves_the_points_and_keeps_every_event() -> None:
    saved = Event(EventType.CHECKPOINT, 1.0, 1)
    fewer = thinned([point(1), saved, point(2), point(3), point(4), point(5)])
    assert [line.step for line in fewer] == [1, 2, 4, 5]
    assert fewer[0] == saved
    assert fewer[1].seconds == 2.0  # type: ignore[union-attr]


def test_points_of_two_attempts_are_not_mixed() -> None:
    start = Event(EventType.START, 1.0)
    assert thinned([point(1), start, point(2), point(3)])[:2] == [point(1), start]
