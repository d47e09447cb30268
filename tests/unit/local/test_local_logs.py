"""The logs of a local run as one."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path
from threading import Thread

from disttrain.api.names import Role
from disttrain.local.folders import RunFolder
from disttrain.local.logs import of_run
from disttrain.logs import Selection


def finished(tmp_path: Path, **logs: str) -> Path:
    """A run that is over, with what its processes printed; their last change was at noon of a day."""
    folder = RunFolder.new("digits", tmp_path)
    for name, text in logs.items():
        log = folder.log(f"digits-{name.replace('_', '-')}")
        log.write_text(text)
        noon = datetime(2026, 11, 30, 12).timestamp()
        os.utime(log, (noon, noon))
    folder.close()
    return folder.path


def test_lines_are_in_the_order_of_the_clocks_and_others_stay_with_the_line_before_them(tmp_path: Path) -> None:
    folder = finished(
        tmp_path,
        master_0="11:00:00.000 INFO a\n11:00:03.000 INFO d\n",
        worker_0="11:00:01.000 INFO b\nplain\n11:00:02.000 INFO c\nan end without a line feed",
    )
    [lines] = of_run(folder, Selection())
    assert [(line.label, line.text[-7:]) for line in lines] == [
        ("master", " INFO a"),
        ("worker-0", " INFO b"),
        ("worker-0", "plain"),
        ("worker-0", " INFO c"),
        ("master", " INFO d"),
    ]


def test_a_run_over_midnight_is_in_order_and_since_leaves_out_what_is_older(tmp_path: Path) -> None:
    folder = finished(
        tmp_path,
        worker_0="23:59:59.000 INFO first\n00:00:01.000 INFO third\n",
        worker_1='{"time": "bad"}\n00:00:00.000 INFO second\n',
    )
    [lines] = of_run(folder, Selection())
    assert [line.text.rpartition(" ")[2] for line in lines if "INFO" in line.text] == ["first", "second", "third"]
    midnight = datetime(2026, 11, 30).timestamp()
    [lines] = of_run(folder, Selection([Role.WORKER], {0}), since=midnight)
    assert [line.text[-5:] for line in lines] == ["third"]
    [lines] = of_run(folder, Selection(), tail=1)
    assert len(lines) == 2


def test_a_run_that_goes_on_is_followed_to_its_end(tmp_path: Path) -> None:
    folder = RunFolder.new("digits", tmp_path)
    log = folder.log("digits-worker-0")
    log.write_text("a\nb")

    def goes_on() -> None:
        with log.open("a") as file:
            file.write("c\n")
        folder.log("digits-worker-1").write_text("late\nthe last, without a line feed")
        time.sleep(0.3)
        folder.close()

    lines = of_run(folder.path, Selection(), follow=True)
    assert [line.text for line in next(lines)] == ["a"]
    (thread := Thread(target=goes_on)).start()
    rest = sorted(line.text for some in lines for line in some)
    thread.join()
    assert rest == ["bc", "late", "the last, without a line feed"]
