"""Runs on a time line as an SVG: when steps were made, which of them were lost, restarts, checkpoints. Part of a page (page.py)."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from disttrain.cli.durations import duration
from disttrain.cli.story import Moment, Story

_WIDTH, _ROW = 900, 74
_LEFT, _RIGHT = 20, 20
_ACROSS: Final = _WIDTH - _LEFT - _RIGHT
_BAR: Final = (34, 16)
"""Its top within the row, and its height."""
_MARKS: Final = {"restart": "M0 0l-5 -9h10z", "fall back": "M0 0l-5 -9h10z", "roll back": "M0 0l-5 -5l5 -5l5 5z"}
"""The shape of each kind of moment, with its tip on the bar."""
_SIZES: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800)
"""Seconds between two numbers of the axis."""


def timeline(stories: Sequence[Story]) -> str:
    """A row a run, all on one axis that begins with each run's own beginning; "" where no run has a history."""
    told = [(story, story.time) for story in stories]
    longest = max((time[1] - time[0] for _, time in told if time), default=0.0)
    if not longest:
        return ""
    height = _ROW * len(told) + 34
    scale = _ACROSS / longest
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        "<title>when steps were made, with restarts and checkpoints</title>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}"/>',
    ]
    for number, (story, time) in enumerate(told):
        if time:
            lines += [f'<g transform="translate({_LEFT} {_ROW * number})">', *_row(story, time, scale), "</g>"]
    return "\n".join([*lines, *_axis(longest, scale, _ROW * len(told)), "</svg>", ""])


def _row(story: Story, time: tuple[float, float], scale: float) -> Iterator[str]:
    began, ended = time
    top, high = _BAR
    yield f'<text x="0" y="16">{escape(story.run.name)}</text>'
    yield f'<rect class="idle" x="0" y="{top}" width="{(ended - began) * scale:.1f}" height="{high}"/>'
    drawn = set()
    for span in story.spans:
        x, wide = round((span.begin - began) * scale, 1), max(0.4, round((span.end - span.begin) * scale, 1))
        if (x, wide, span.lost) not in drawn:  # of a week with thousands of interruptions many fall together
            drawn.add((x, wide, span.lost))
            name = "lost" if span.lost else "made"
            yield f'<rect class="{name}" x="{x}" y="{top}" width="{wide}" height="{high}"/>'
    for x in dict.fromkeys(round((at - began) * scale) for at in story.checkpoints):
        yield f'<path class="saved" d="M{x} {top + high + 2}v6"/>'
    for moment in story.moments:
        yield from _mark(moment, began, scale)


def _mark(moment: Moment, began: float, scale: float) -> Iterator[str]:
    x, top = (moment.time - began) * scale, _BAR[0]
    about = f"<title>{escape(f'{moment.kind} after {duration(moment.time - began)}: {moment.text}')}</title>"
    if moment.kind == "start":
        yield f'<path class="begin" d="M{x:.1f} {top - 4}V{top + _BAR[1] + 4}">{about}</path>'
    elif shape := _MARKS.get(moment.kind):
        name = moment.kind.replace(" ", "-")
        yield f'<path class="{name}" transform="translate({x:.1f} {top})" d="{shape}">{about}</path>'


def _axis(longest: float, scale: float, y: int) -> Iterator[str]:
    size = next((one for one in _SIZES if longest / one <= 8), _SIZES[-1])
    yield f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>'
    for number in range(int(longest / size) + 1):
        x = _LEFT + number * size * scale
        anchor = "start" if not number else "middle" if x < _WIDTH - 50 else "end"
        yield f'<path class="grid" d="M{x:.1f} {y}v5"/><text x="{x:.1f}" y="{y + 20}" text-anchor="{anchor}">{_after(number * size)}</text>'


def _after(seconds: int) -> str:
    """0 s, 15 s, 2 min, 3 h, 4 d"""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:g} {unit}"
    return f"{seconds} s"
