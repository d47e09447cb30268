"""`disttrain report`: a run, or two, as one file of HTML that opens offline.

Not here: what is said (story.py), how it looks (page.py).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from disttrain import __version__
from disttrain.cli import history
from disttrain.cli.page import page
from disttrain.cli.story import Story, read
from disttrain.client.errors import ClusterError
from disttrain.client.text import one_line
from disttrain.local.runs import ROOT

_HERE: history.Where = (None, None)


class CannotReport(Exception):
    """Why, and what to do."""


def report(names: Sequence[str], output: str | None, where: history.Where) -> int:
    """Writes the report. 0, or 2 where there is nothing to report; of a cluster its codes. Raises OSError where it cannot be written."""
    try:
        if output is not None and output != "-" and Path(output).suffix not in (".html", ".htm"):
            raise CannotReport(
                f"-o {one_line(output)}: a report is a page: name a file that ends with .html, or - for standard output"
            )
        stories = [_story(name, where) for name in names]
    except (CannotReport, history.NoHistory, ClusterError) as error:
        print(f"report: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, ClusterError) else 2
    text = page(stories, made=datetime.now(UTC), by=f"disttrain {__version__}")
    if output == "-":
        print(text, end="")
        return 0
    path = Path(output or f"report-{'-and-'.join(story.run.name for story in stories)}.html")
    path.write_text(text, encoding="utf-8")
    print(path)
    return 0


def _story(name: str, where: history.Where) -> Story:
    try:
        with history.opened(name, where) as file:
            if where != _HERE:
                return read(file, one_line(name), _of_cluster(name, where))
            folder = Path(file.name).resolve().parent  # that of a run has its time in its name
            return read(file, one_line(folder.name), _of_run(folder))
    except OSError as error:
        raise CannotReport(f"{one_line(name)}: {error.strerror or error}") from error


def _of_run(folder: Path) -> Mapping[str, Any]:
    """The job of a history's folder: that of the run itself, or of its checkpoints."""
    for path in (folder / "job.json", ROOT / "runs" / folder.name / "job.json"):
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _of_cluster(name: str, where: history.Where) -> Mapping[str, Any]:
    from disttrain.cli import cluster  # imports what takes half a second

    return cluster.call(cluster.Where(*where), lambda jobs, _: jobs.get(name))
