"""`disttrain report`: what the page says of a run and of two, that it needs no network, and what cannot be reported."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.history import FILE, Event, EventType, Point
from disttrain.cli import story
from disttrain.cli.main import main

RUN, OTHER = "digits-20261130-101112-0123abcd", "digits-20261130-111112-9876fedc"
HOSTILE = "<script>alert(1)</script><img src=http://192.0.2.1/x>\x1b[31m"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def point(step: int, time: float, **fields: Any) -> Point:
    return Point(step=step, time=time, seconds=1.0, loss=1 / step, samples_per_second=100.0, workers=2, **fields)


LINES = [
    Event(EventType.START, 100.0, details={"attempt": 1}),
    *(point(n, 103.0 + n) for n in range(1, 6)),
    Event(EventType.CHECKPOINT, 106.0, 3),
    Event(EventType.RESTART, 109.0, 5, {"pod": "worker-1", "exitCode": 137, "message": "killed by SIGKILL"}),
    Event(EventType.FALL_BACK, 112.0, 3),
    *(point(n, 110.0 + n) for n in range(4, 8)),
    Event(
        EventType.RANKS,
        117.0,
        details={
            "ranks": [{"rank": n, "samples": 100, "loss": 0.5, "phases": {"forward": s}} for n, s in ((1, 9), (0, 3))]
        },
    ),
    Event(EventType.END, 117.0, 7, {"finished": True, "goodput": {"productiveSeconds": 7.0, "redoneSeconds": 3.0}}),
]
JOB = {
    "spec": {"strategy": {"type": "DataParallel"}, "trainer": {"epochs": 3, "config": {"hfToken": "s3cret-in-plain"}}},
    "status": {"state": "Complete", "training": {"totalSteps": 7}},
}


def write(run: str, lines: list[Point | Event], job: Any = JOB) -> None:
    folder = Path(".disttrain/runs", run)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "job.json").write_text(json.dumps(job))
    (folder / FILE).write_text("".join(f"{line.encode()}\n" for line in lines))


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_tells_curves_restarts_time_ranks_and_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    write(RUN, LINES)
    assert main(["report", "digits"]) == 0
    assert capsys.readouterr().out == f"report-{RUN}.html\n"
    page = Elements(Path(f"report-{RUN}.html").read_text())
    for expected in (
        "7 of 7",
        "exit code 137: killed by SIGKILL",
        "the steps after 3 were lost and done again",
        "finished at step 7",
        "70.0% of 10.0 s were productive",
        '"epochs": 3',
    ):
        assert expected in page.text
    assert "s3cret-in-plain" not in page.text
    assert sum(tag == "path" and attributes.get("class") == "restart" for tag, attributes in page.found) == 1


def test_steps_that_a_fall_back_undid_are_lost_time_and_a_quiet_time_is_none() -> None:
    told = story.of_lines(LINES, RUN, JOB)
    assert [(span.begin, span.end, span.lost) for span in told.spans] == [
        (103.0, 106.0, False),
        (106.0, 108.0, True),
        (113.0, 117.0, False),
    ]
    assert [rank.rank for rank in told.ranks] == [0, 1]


def test_points_that_were_left_out_in_reading_are_no_quiet_time() -> None:
    lines = [point(n, 100.0 + n) for n in range(1, 1000, 20)]
    assert len(story.of_lines([*lines, point(2000, 2100.0)], RUN, {}).spans) == 2


def test_two_runs_are_compared_by_the_fields_that_differ() -> None:
    write(RUN, LINES)
    write(OTHER, LINES, {**JOB, "spec": {**JOB["spec"], "trainer": {"epochs": 4, "batchSize": 8}}})
    assert main(["report", RUN, OTHER, "-o", "two.html"]) == 0
    found = story.differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}})
    assert found == [("a.c", "2", ""), ("a.d", "", "3")]
    text = Elements(Path("two.html").read_text()).text
    assert "trainer.epochs34" in text
    assert text.count("what happened") == 2


def test_hostile_names_are_text_and_nothing_is_asked_of_the_network() -> None:
    values = [point(n, 103.0 + n, values={HOSTILE: 1.0}) for n in range(1, 4)]
    ended = Event(EventType.END, 120.0, 3, {"message": HOSTILE, "goodput": {"productiveSeconds": 1, HOSTILE: 3}})
    restart = Event(EventType.RESTART, 119.0, 3, {"exitCode": HOSTILE, "message": HOSTILE})
    write(RUN, [*values, restart, ended], {"spec": {"trainer": {HOSTILE: HOSTILE}}, "status": {"state": HOSTILE}})
    assert main(["report", RUN, "-o", "page.html"]) == 0
    written = Path("page.html").read_text()
    page = Elements(written)
    assert not {tag for tag, _ in page.found} & {"script", "img", "link", "iframe", "object", "a", "base"}
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    assert not [a for _, a in page.found if {"src", "href", "xlink:href", "srcset"} & set(a)]
    assert not re.search(r"url\(|@import", written)
    assert "\x1b" not in written
    assert "default-src 'none'" in written
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no history.jsonl of nowhere"),
        ([RUN, "-o", "page.pdf"], "name a file that ends with .html"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(RUN, LINES)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "job", [[], "x", {"spec": 3, "status": []}, {"spec": {"strategy": 1}, "status": {"goodput": 1}}]
)
def test_a_job_of_any_form_and_a_history_without_steps_make_a_page(
    job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write(RUN, [], job)
    Path(".disttrain/runs", RUN, FILE).write_bytes(
        b'{"step": 3, "ti\n[1]\n{"event": "ranks", "time": 1, "ranks": [1]}\n'
    )
    assert main(["report", RUN, "-o", "-"]) == 0
    assert "The history holds no step yet." in capsys.readouterr().out
