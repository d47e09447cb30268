"""`disttrain plot`: what is drawn on a terminal of 80 and 160 columns, in a pipe and in files, and what cannot be drawn.

With DISTTRAIN_WRITE_SCREENS=1 in the environment the tests write the screens that they compare with.
"""

from __future__ import annotations

import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from disttrain.api.history import FILE, Event, EventType, Point
from disttrain.cli import curves
from disttrain.cli.main import main

SCREENS = Path("tests/unit/cli/screens").resolve()
FIRST, SECOND = "digits-20261130-101112-0123abcd", "digits-20261130-111112-9876fedc"


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs, of which the second learns faster and ends earlier."""
    monkeypatch.chdir(tmp_path)
    for run, rate, points in ((FIRST, 200, 120), (SECOND, 100, 80)):
        write(
            run,
            [
                Point(
                    step=5 * n,
                    time=float(n),
                    seconds=1.0,
                    loss=2 * math.exp(-5 * n / rate) + 0.2 * (n % 3),
                    samples_per_second=500_000.0 / rate + 100 * (n % 7),
                )
                for n in range(1, points)
            ],
        )


def write(run: str, lines: list[Point | Event]) -> Path:
    folder = Path(".disttrain/runs", run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    (folder / FILE).write_text("".join(f"{line.encode()}\n" for line in lines))
    return folder / FILE


def piped(*runs: str, **environment: str) -> str:
    command = [sys.executable, "-m", "disttrain.cli.main", "plot", *runs]
    variables = {**os.environ, "PYTHONUTF8": "1", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("screen", "runs", "environment"),
    [
        ("one-80", [FIRST], {"COLUMNS": "80"}),
        ("one-160", [FIRST], {"COLUMNS": "160"}),
        ("two-80", [FIRST, SECOND], {"COLUMNS": "80"}),
        ("two-160", [FIRST, SECOND], {"COLUMNS": "160"}),
        ("ascii-80", [FIRST, SECOND], {"COLUMNS": "80", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}),
    ],
)
def test_a_pipe_gets_text_without_colours_of_the_width_that_is_asked_for(
    screen: str, runs: list[str], environment: dict[str, str]
) -> None:
    shown = piped(*runs, **environment)
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= int(environment["COLUMNS"])
    if "DISTTRAIN_WRITE_SCREENS" in os.environ:
        SCREENS.mkdir(exist_ok=True)
        (SCREENS / f"plot-{screen}.txt").write_text(shown)
    assert shown == (SCREENS / f"plot-{screen}.txt").read_text()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_a_colour_for_each_run_unless_no_color_is_set(no_color: str) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "disttrain.cli.main", "plot", FIRST, SECOND]
    environment = {**os.environ, "PYTHONUTF8": "1", "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": no_color}
    with subprocess.Popen(command, env=environment, stdout=theirs) as child:
        os.close(theirs)
        shown = b""
        while piece := read_some(ours):
            shown += piece
        assert child.wait() == 0
    os.close(ours)
    assert (b"\x1b[36m" in shown, b"\x1b[33m" in shown) == ((True, True) if not no_color else (False, False))


def read_some(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other side is closed
        return b""


def curve_of(path: Path) -> curves.Curve:
    with open(path, "rb") as file:
        return curves.read(file, "run").loss


def test_the_steps_that_a_fall_back_undid_are_not_drawn() -> None:
    points = [Point(step=n, time=1.0, seconds=1.0, loss=float(n)) for n in range(1, 5)]
    path = write("again", [*points, Event(EventType.FALL_BACK, 2.0, 2), points[2]])
    assert curve_of(path) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_of_a_file_that_is_too_large_every_point_of_a_few_is_read_and_every_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points: list[Point | Event] = [Point(step=n, time=1.0, seconds=1.0, loss=1.0) for n in range(1000)]
    path = write("large", [*points[:500], Event(EventType.FALL_BACK, 2.0, 99), *points[500:]])
    monkeypatch.setattr(curves, "WHOLE_BYTES", path.stat().st_size - 1)
    monkeypatch.setattr(curves, "_THINNED_BYTES", path.stat().st_size // 10)
    steps = [step for step, _ in curve_of(path)]
    assert steps[:10] == list(range(0, 100, 10))
    assert 0 < steps[10] - 500 < 10
    assert len(steps) == 60


@pytest.mark.parametrize("kind", ["svg", "html"])
def test_a_file_needs_nothing_else_and_a_hostile_name_is_escaped(kind: str) -> None:
    evil = "<script>&amp; x"
    Path(".disttrain/runs", SECOND).rename(Path(".disttrain/runs", evil))
    assert main(["plot", FIRST, f".disttrain/runs/{evil}", "-o", f"out.{kind}"]) == 0
    text = Path(f"out.{kind}").read_text()
    assert "<script" not in text
    assert text.count("http") == 1  # the name of the format
    picture = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    space = "{http://www.w3.org/2000/svg}"
    assert picture.findtext(f"{space}title") == f"loss and throughput of {FIRST}, {evil}"
    drawn = [path.get("class") for path in picture.iter(f"{space}path") if path.get("class") != "grid"]
    assert drawn == ["curve run-0", "curve run-1"] * 3


@pytest.mark.parametrize(
    "lines",
    [
        [Point(step=3, time=1.0, seconds=1.0, loss=0.5)],
        [Point(step=n, time=1.0, seconds=1.0, loss=0.0, samples_per_second=0.0) for n in range(3)],
        [Point(step=n, time=1.0, seconds=1.0, samples_per_second=1e-9) for n in (1, 10**12)],
    ],
)
def test_a_single_point_and_curves_without_a_slope_are_drawn(
    capsys: pytest.CaptureFixture[str], lines: list[Point | Event]
) -> None:
    write("flat", lines)
    assert main(["plot", ".disttrain/runs/flat"]) == 0
    assert capsys.readouterr().out.count("step") >= 2
    assert main(["plot", ".disttrain/runs/flat", "-o", "flat.svg"]) == 0
    ElementTree.parse("flat.svg")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], "plot: there is no history.jsonl of nothing"),
        (["empty-20261130-101112-01234567"], "no step is in the history yet; try again later"),
        ([FIRST, "-o", "out.pdf"], "plot: -o out.pdf: name a file that ends with .svg, .html, .png"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    write("empty-20261130-101112-01234567", [])
    assert main(["plot", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


def test_a_png_needs_a_package_that_may_be_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert main(["plot", FIRST, "-o", "out.png"]) == 2
    assert "a PNG needs resvg (pip install resvg-py); .svg and .html need nothing" in capsys.readouterr().err
