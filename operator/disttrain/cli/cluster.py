"""The verbs of one job, and of all, on a cluster.

Not here: what is asked of the API server (disttrain.client), and how it looks (status.py).
"""

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypeVar

import yaml

from disttrain.cli import status as texts
from disttrain.client.errors import ClusterError, NotReachable
from disttrain.client.jobs import Jobs
from disttrain.kube.api import NoCluster
from disttrain.kube.client import KubeClient, connect, own_namespace

T = TypeVar("T")
Format: TypeAlias = Literal["text", "json", "yaml"]

_TIMEOUT_SECONDS: Final = 30.0
_CONNECTIONS: Final = 4


@dataclass(frozen=True, slots=True)
class Where:
    """The cluster and the namespace that a verb is about."""

    namespace: str | None = None
    """None: that of the context."""
    context: str | None = None
    """Of the kubeconfig; None: the current one."""


def list_jobs(where: Where, *, everywhere: bool, output: Format) -> int:
    """`disttrain ls`."""

    async def do(jobs: Jobs) -> None:
        found = await jobs.all(everywhere=everywhere)
        if output != "text":
            _print_object({"apiVersion": "v1", "kind": "List", "items": found}, output)
        elif found:
            print(texts.table(found, with_namespace=everywhere))
        else:
            print(f"no jobs in {'any namespace' if everywhere else f'namespace {jobs.namespace}'}", file=sys.stderr)

    return _run(where, do)


def show(where: Where, name: str, *, output: Format) -> int:
    """`disttrain status`."""

    async def do(jobs: Jobs) -> None:
        job = await jobs.get(name)
        if output != "text":
            _print_object(job, output)
        else:
            print(texts.tree(job, await jobs.pods(job)))

    return _run(where, do)


def events(where: Where, name: str) -> int:
    """`disttrain events`."""

    async def do(jobs: Jobs) -> None:
        found = await jobs.events(await jobs.get(name))
        print(texts.events(found) if found else f"no events about {name}: a cluster keeps them for an hour")

    return _run(where, do)


def suspend(where: Where, name: str, *, suspended: bool) -> int:
    """`disttrain suspend` and `disttrain resume`."""

    async def do(jobs: Jobs) -> None:
        word = "suspend" if suspended else "resume"
        job = await jobs.change(name, {"suspend": suspended}, what=f"{word} the job")
        print(f"{name}: {texts.what_follows(job, suspended=suspended)}")

    return _run(where, do)


def cancel(where: Where, name: str) -> int:
    """`disttrain cancel`."""

    async def do(jobs: Jobs) -> None:
        await jobs.delete(name)
        print(f"{name}: deleted; checkpoints stay on their claim")

    return _run(where, do)


def scale(where: Where, name: str, workers: int, *, besides: str = "") -> int:
    """`disttrain scale` of a job on a cluster. besides: what an error begins with."""

    async def do(jobs: Jobs) -> None:
        print(f"{name}: {await jobs.scale(name, workers)} -> {workers} workers")

    return _run(where, do, besides=besides)


def _run(where: Where, do: Callable[[Jobs], Awaitable[None]], *, besides: str = "") -> int:
    return run(where, lambda jobs, _: do(jobs), besides=besides)


def run(
    where: Where,
    do: Callable[[Jobs, KubeClient], Awaitable[int | None]],
    *,
    besides: str = "",
    connections: int = _CONNECTIONS,
) -> int:
    """Exit codes: that of `do`, or 0; 2 wrong input, 3 no cluster, 4 not permitted, 5 not installed, and those of client.errors."""
    try:
        return call(where, do, connections=connections) or 0
    except ClusterError as error:
        print(f"disttrain: {besides}{error}", file=sys.stderr)
        return error.exit_code


def call(where: Where, do: Callable[[Jobs, KubeClient], Awaitable[T]], *, connections: int = _CONNECTIONS) -> T:
    """What `do` returns. Raises ClusterError."""

    async def connected() -> T:
        try:
            async with connect(connections=connections, context=where.context) as client:
                api = KubeClient(client, timeout_seconds=_TIMEOUT_SECONDS)
                return await do(Jobs(api, where.namespace or own_namespace(where.context)), api)
        except NoCluster as error:
            raise NotReachable(f"{error}, or run the job on this machine: `disttrain run FILE`") from error

    logging.getLogger("kubernetes").setLevel(logging.ERROR)  # it warns of what we say
    return asyncio.run(connected())


def _print_object(body: Any, output: Format) -> None:
    if output == "json":
        print(json.dumps(body, indent=2))
    else:
        print(yaml.safe_dump(body, sort_keys=False), end="")
