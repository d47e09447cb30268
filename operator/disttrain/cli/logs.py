"""`disttrain logs`: what the processes of a job print, of a run of this folder or of a job of the cluster, as one log.

Not here: where the lines come from (client/logs.py, local/logs.py) and their order (disttrain.logs).
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from disttrain.api.names import Role
from disttrain.cli.lines import end_with_reader, printer_for
from disttrain.cli.options import WrongOption, span
from disttrain.local import logs as local
from disttrain.local.runs import find_run, is_run, no_run
from disttrain.logs import Selection

_ROLES: Final = {"master": Role.MASTER, "ps": Role.PARAMETER_SERVER, "worker": Role.WORKER}
_RANKS: Final = re.compile(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*")
_MOST_RANKS: Final = 100_000


def logs(options: argparse.Namespace) -> int:
    """Exit codes: 0 done, 2 wrong input, and those of a cluster."""
    try:
        selection = Selection([_ROLES[role] for role in options.role or ()], _ranks(options.rank))
        since = None if options.since is None else _moment(options.since, datetime.now(UTC))
        tail = None if options.tail is None else _count(options.tail)
    except WrongOption as error:
        print(f"disttrain: {error}", file=sys.stderr)
        return 2
    if options.follow:
        end_with_reader(sys.stdout)
    of_cluster = options.namespace is not None or options.context is not None
    if not of_cluster and is_run(options.job):
        if options.previous:
            print(
                "disttrain: --previous is of a cluster: the log of a run's process has its predecessors', too",
                file=sys.stderr,
            )
            return 2
        return _of_run(find_run(options.job), selection, since, tail, follow=options.follow)
    from disttrain.cli import cluster_logs  # imports what takes half a second

    return cluster_logs.logs(options, selection, since, tail, besides="" if of_cluster else no_run(options.job))


def _of_run(folder: Path, selection: Selection, since: datetime | None, tail: int | None, *, follow: bool) -> int:
    shows = printer_for(sys.stdout)
    moment = None if since is None else since.timestamp()
    with contextlib.closing(local.of_run(folder, selection, since=moment, tail=tail, follow=follow)) as lines:
        for some in lines:
            shows(some)
    return 0


def _ranks(given: Sequence[str] | None) -> frozenset[int]:
    """Such as 0,2-5, more than once."""
    ranks: set[int] = set()
    for text in given or ():
        if not _RANKS.fullmatch(text):
            raise WrongOption(f"--rank {text[:40]!r} names no ranks: write such as 0, 0,3 or 0-7")
        for part in text.split(","):
            first, _, last = part.partition("-")
            if (end := int(last or first)) - int(first) > _MOST_RANKS:
                raise WrongOption(f"--rank {text[:40]!r} names more ranks than a job has")
            ranks.update(range(int(first), end + 1))
    return frozenset(ranks)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise WrongOption(f"--tail {text[:40]!r} is no number of lines: write such as 100")
    return int(text)


def _moment(text: str, now: datetime) -> datetime:
    """A span before now, such as 1h30m, or a time of RFC 3339."""
    if (before := span(text)) is not None:
        with contextlib.suppress(OverflowError):
            return now - before
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo is not None else moment.astimezone()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise WrongOption(
            f"--since {text[:40]!r} is no time: write such as 10m, 1h30m or 2026-11-30T07:00:00Z"
        ) from None
