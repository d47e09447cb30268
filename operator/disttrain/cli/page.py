"""The page of a report: one file of HTML, in light and dark, without a script and with no request to the network.

Not here: what is said of a run (story.py), the curves (drawing.py), the time line (timeline.py).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Final

from disttrain.cli.drawing import svg
from disttrain.cli.durations import duration
from disttrain.cli.story import Rank, Story, differences, panels
from disttrain.cli.timeline import timeline
from disttrain.client.text import one_line

_SLOW: Final = 1.25
"""A rank that computes so many times as long for its samples as the middle one is marked."""
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE: Final = """
  :root { color-scheme: light dark; --ground: #ffffff; --text: #24292f; --faint: #57606a; --line: #d0d7de; --soft: #f6f8fa;
    --lost: #cf222e; --idle: #d8dee4;
    --productive: #1a7f37; --queued: #8c959f; --starting: #0969da; --redone: #cf222e; --stalled: #9a6700; --undecided: #6e7781 }
  @media (prefers-color-scheme: dark) { :root { --ground: #0d1117; --text: #e6edf3; --faint: #9198a1; --line: #30363d; --soft: #161b22;
    --lost: #f85149; --idle: #2d333b;
    --productive: #3fb950; --queued: #6e7681; --starting: #58a6ff; --redone: #f85149; --stalled: #d29922; --undecided: #8b949e } }
  body { margin: 2em auto; max-width: 920px; padding: 0 1em; background: var(--ground); color: var(--text);
    font: 14px/1.5 "DejaVu Sans", Arial, sans-serif }
  h1 { font-size: 22px; overflow-wrap: anywhere } h2 { font-size: 17px; margin: 2em 0 .5em; border-bottom: 1px solid var(--line) }
  svg { display: block; max-width: 100%; width: 100%; height: auto } .wide { overflow-x: auto }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums } th { text-align: left; color: var(--faint); font-weight: normal }
  td:first-child { white-space: nowrap; min-width: 5em }
  td, th { padding: 2px 16px 2px 0; vertical-align: top; overflow-wrap: anywhere } tbody tr + tr > * { border-top: 1px solid var(--line) }
  .number { text-align: right; white-space: nowrap } .note { color: var(--faint) } .slow { color: var(--lost) }
  .share { display: flex; height: 18px; margin: .3em 0; background: var(--idle) }
  .key { display: inline-block; width: 10px; height: 10px; margin-right: 6px }
  pre { background: var(--soft); padding: 1em; overflow: auto; max-height: 40em; font-size: 12px } summary { cursor: pointer }
  svg text { white-space: pre } .idle { fill: var(--idle) } .made { fill: var(--productive) } .lost { fill: var(--lost) }
  .saved { stroke: var(--faint); stroke-width: 1 } .begin { stroke: var(--text); stroke-width: 1.5 }
  .restart { fill: var(--lost) } .fall-back { fill: none; stroke: var(--lost) } .roll-back { fill: var(--stalled) }
"""


def page(stories: Sequence[Story], *, made: datetime, by: str) -> str:
    """The whole file. by: the program and its version."""
    title = " and ".join(story.run.name for story in stories)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">Written by {escape(by)} at {made:%Y-%m-%d %H:%M} UTC.</p>',
        _beside([dict(story.facts) for story in stories], [story.run.name for story in stories]),
        *_section("Curves", _curves(stories)),
        *_section("Time line", _times(stories)),
        *_section("Where the time went", _goodput(stories)),
        *_section("Ranks", _ranks(stories)),
        *_section("Configuration", _configuration(stories)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _section(title: str, parts: Iterable[str]) -> list[str]:
    found = [part for part in parts if part]
    return [f"<h2>{title}</h2>", *found] if found else []


def _curves(stories: Sequence[Story]) -> Iterator[str]:
    if found := panels(stories):
        yield svg([story.run for story in stories], found)
    else:
        yield '<p class="note">The history holds no step yet.</p>'


def _times(stories: Sequence[Story]) -> Iterator[str]:
    if not (drawn := timeline(stories)):
        return
    yield drawn
    yield (
        '<p class="note">Green: steps were made. Red: steps that were lost, and done again. Grey: no step was made. A long stroke is a '
        "start of the master, a red triangle the restart of a process, an empty one a fall back to earlier steps, a short stroke below "
        "a checkpoint.</p>"
    )
    for story in stories:
        began = story.time[0] if story.time else 0.0
        rows = [
            [
                f"{datetime.fromtimestamp(one.time, UTC):%Y-%m-%d %H:%M:%S}",
                duration(one.time - began),
                one.kind,
                one.text,
            ]
            for one in story.moments
        ]
        if rows:
            yield f"<details{'' if len(rows) > 30 else ' open'}><summary>{escape(story.run.name)}: what happened</summary>"
            yield _table(["time (UTC)", "after", "event", ""], rows, numbers={1}) + "</details>"


def _goodput(stories: Sequence[Story]) -> Iterator[str]:
    for story in stories:
        total = sum(story.goodput.values())
        if not total:
            continue
        parts = "".join(
            f'<span style="flex:{seconds / total:.5f};background:var(--{name})"></span>'
            for name, seconds in story.goodput.items()
        )
        productive = story.goodput.get("productive", 0.0) / total
        yield f"<p>{escape(story.run.name)}: {productive:.1%} of {duration(total)} were productive</p>"
        yield f'<div class="share" role="img" aria-label="productive {productive:.1%}">{parts}</div>'
        rows = "".join(
            f'<tr><td><span class="key" style="background:var(--{name})"></span>{name}</td><td class="number">{duration(seconds)}</td>'
            f'<td class="number">{seconds / total:.1%}</td></tr>'
            for name, seconds in story.goodput.items()
        )
        yield f"<table><tbody>{rows}</tbody></table>"


def _ranks(stories: Sequence[Story]) -> Iterator[str]:
    for story in stories:
        if not story.ranks:
            continue
        names = list(dict.fromkeys(name for rank in story.ranks for name in rank.phases))
        costs = sorted(cost for rank in story.ranks if (cost := _cost(rank)))
        middle = costs[(len(costs) - 1) // 2] if costs else 0.0
        rows = []
        for rank in story.ranks:
            cost = _cost(rank)
            slow = bool(cost and len(costs) > 1 and cost > _SLOW * middle)
            rows.append(
                [
                    str(rank.rank),
                    _shown(rank.samples),
                    _shown(rank.loss),
                    *(_shown(rank.phases.get(name)) for name in names),
                    "slow" if slow else "",
                ]
            )
        yield f'<p>{escape(story.run.name)} <span class="note">since its last start; seconds by phase</span></p>'
        head = ["rank", "samples", "loss", *names, ""]
        yield f'<div class="wide">{_table(head, rows, numbers=set(range(len(head) - 1)))}</div>'


def _cost(rank: Rank) -> float | None:
    """Seconds of computing for a sample. What a rank waits for others is not its own."""
    own = sum(seconds for name, seconds in rank.phases.items() if name not in ("communicate", "checkpoint"))
    return own / rank.samples if rank.samples else None


def _configuration(stories: Sequence[Story]) -> Iterator[str]:
    if len(stories) == 2 and all(story.spec for story in stories):
        rows = differences(stories[0].spec, stories[1].spec)
        if rows:
            yield _table(["field", *(story.run.name for story in stories)], [list(row) for row in rows])
        else:
            yield "<p>Both runs have the same configuration.</p>"
    for story in stories:
        if story.spec:
            text = escape(json.dumps(story.spec, indent=2, ensure_ascii=False))
            yield f"<details><summary>{escape(story.run.name)}: spec, without its secrets</summary><pre>{text}</pre></details>"


def _beside(facts: Sequence[dict[str, str]], names: Sequence[str]) -> str:
    """What is known of each run, a column a run."""
    rows = [
        [name, *(one.get(name, "") for one in facts)] for name in dict.fromkeys(name for one in facts for name in one)
    ]
    return _table(["", *names] if len(names) > 1 else [], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    def row(cells: Sequence[str], tag: str) -> str:
        marked = (
            (' class="number"' if i in numbers else ' class="slow"' if cell == "slow" else "", cell)
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(f'<{tag}{mark}>{escape(one_line(cell))}</{tag}>' for mark, cell in marked)}</tr>"

    above = f"<thead>{row(head, 'th')}</thead>" if head else ""
    return f"<table>{above}<tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table>"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
