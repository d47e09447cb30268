"""`disttrain logs` of a job of the cluster."""

import argparse
import contextlib
import sys
from datetime import datetime
from typing import Final

from disttrain.cli import cluster
from disttrain.cli.lines import printer_for
from disttrain.client.jobs import Jobs
from disttrain.client.logs import Wanted, of_job
from disttrain.client.text import one_line
from disttrain.client.watching import Api
from disttrain.logs import Selection

CONNECTIONS: Final = 0
"""Without a limit: each pod's log is one, for as long as it is followed."""


def logs(
    options: argparse.Namespace, selection: Selection, since: datetime | None, tail: int | None, *, besides: str
) -> int:
    """besides: what an error begins with."""
    moment = "" if since is None else f"{since:%Y-%m-%dT%H:%M:%SZ}"
    wanted = Wanted(selection, moment, tail, options.previous)

    async def do(jobs: Jobs, api: Api) -> None:
        job = await jobs.get(options.job)
        shows, nothing = printer_for(sys.stdout), True
        if options.follow and not options.previous and not await jobs.pods(job):
            print(f"{options.job}: {_why_none(job)}", file=sys.stderr)
        async with contextlib.aclosing(of_job(jobs, api, job, wanted, follow=options.follow)) as lines:
            async for some in lines:
                nothing = False
                shows(some)
        if nothing:
            why = "no container ran before in its pods" if options.previous else _why_none(job)
            print(f"{options.job}: no lines: {why}", file=sys.stderr)

    where = cluster.Where(options.namespace, options.context)
    return cluster.run(where, do, besides=besides, connections=CONNECTIONS)


def _why_none(job: dict[str, object]) -> str:
    """Why there is nothing to be shown of a job, as far as its status says."""
    status = job.get("status")
    state = status.get("state") if isinstance(status, dict) else None
    if state in ("Complete", "Failed"):
        return f"it is {one_line(state)}, and the logs of pods go with them"
    return f"no pod prints yet; it is {one_line(state or 'not seen by an operator yet')}; `disttrain status` says why it waits"
