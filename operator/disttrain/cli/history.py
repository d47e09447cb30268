"""`disttrain history`: the points of the curves of a run and its events, of a local run or of a job of the cluster that lives.

Not here: what a line is (api.history), how a master is asked (client/history.py).
"""

import csv
import glob
import io
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final, TypeAlias

from disttrain.api.history import FILE, Event, Point, decode, kept
from disttrain.client.errors import ClusterError
from disttrain.client.text import one_line
from disttrain.local.runs import ROOT, runs_of

_COLUMNS: Final = (
    "time", "step", "epoch", "loss", "samplesPerSecond", "gradientNorm", "staleness", "workers", "event"
)  # fmt: skip


class NoHistory(Exception):
    """There is none to be read; the text says why, and what to do."""


Where: TypeAlias = tuple[str | None, str | None]
"""A namespace and a context of a cluster; two None: this folder."""


def history(run: str, output: str, where: Where) -> int:
    """Prints the history of a run: as a table, as csv, or as json. 0, or 2 where there is none; of a cluster its codes."""
    try:
        with opened(run, where) as file:
            lines = kept(line for text in file if isinstance(line := decode(text), Point | Event))
    except (NoHistory, OSError, ClusterError) as error:
        print(f"history: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, ClusterError) else 2
    bodies = [json.loads(line.encode()) for line in lines]
    if output == "json":
        print(json.dumps(bodies, indent=1))
        return 0
    rows = [[_cell(body.get(name)) for name in _COLUMNS] for body in bodies]
    if output == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([_COLUMNS, *rows])
        return 0
    for row in rows:
        row[0] = f"{datetime.fromtimestamp(float(row[0]), UTC):%Y-%m-%d %H:%M:%S}"
    print(_aligned([[name.upper() for name in _COLUMNS], *rows]))
    return 0


def opened(run: str, where: Where) -> IO[bytes]:
    """The lines of a run, or where a namespace or context is given of a job of the cluster. Raises NoHistory, OSError, ClusterError."""
    if where == (None, None):
        return open(find(run), "rb")
    from disttrain.cli import cluster  # imports what takes half a second
    from disttrain.client.history import of_job

    return io.BytesIO(cluster.call(cluster.Where(*where), lambda jobs, api: of_job(jobs, api, run)))


def find(run: str, root: Path = ROOT) -> Path:
    """The file of a run: its folder, the folder's name, or a job's name, which stands for its newest run; or of a folder of checkpoints.
    Raises NoHistory."""
    path = Path(run)
    for folder in (path, root / "runs" / run, *runs_of(run, root)[:1]):
        if run and folder.is_dir():
            beside_checkpoints = (root / "claims").glob(f"*/{glob.escape(folder.resolve().name)}/{FILE}")
            if found := next((file for file in (folder / FILE, *beside_checkpoints) if file.is_file()), None):
                return found
    raise NoHistory(
        f"there is no {FILE} of {one_line(run)}: name a run of {root / 'runs'}, its job, or a folder of checkpoints; with -n a job of "
        "the cluster that runs"
    )


def _cell(value: object) -> str:
    return "" if value is None else one_line(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
