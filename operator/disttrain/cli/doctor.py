"""`disttrain doctor`: what this machine and the cluster have for DistTrain, what is missing, and the command that mends it.

Not here: what is looked at (machine_checks.py, client/cluster_checks.py).
"""

import asyncio
import json
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from disttrain import __version__
from disttrain.cli import machine_checks
from disttrain.cli.lines import is_terminal
from disttrain.client.errors import NotReachable, Rejected, of_answer
from disttrain.client.findings import Finding, Level

_TIMEOUT_SECONDS: Final = 5.0
_CONNECTIONS: Final = 8
_COLOURS: Final = {Level.OK: "32", Level.WARNING: "33", Level.MISSING: "31", Level.UNKNOWN: "35", Level.NOTE: "36"}
_TEXT: Final = 100
"""Columns of a text."""


def doctor(namespace: str | None, context: str | None, output: str) -> int:
    """Prints the findings. 0, 1 where something is missing; 2 for wrong input, 3 where the cluster that is asked for does not answer."""
    asked = namespace is not None or context is not None
    found = [Finding("disttrain", Level.OK, __version__), *machine_checks.checks()]
    code = 0
    try:
        found += _of_cluster(namespace, context, asked=asked)
    except Rejected as error:
        print(f"doctor: {error}", file=sys.stderr)
        return error.exit_code
    except NotReachable as error:
        found.append(
            Finding("cluster", Level.MISSING, str(error), "check KUBECONFIG, --context, and `kubectl cluster-info`")
        )
        code = error.exit_code if asked else 0
    _print(found, output)
    return code or int(any(one.level is Level.MISSING for one in found))


def _of_cluster(namespace: str | None, context: str | None, *, asked: bool) -> list[Finding]:
    """The findings about the cluster; a note where none is known and none is asked for. Raises NotReachable, Rejected."""
    if not asked and not _is_known():
        return [
            Finding(
                "cluster",
                Level.NOTE,
                "there is no kubeconfig, so that only this machine was looked at",
                "set KUBECONFIG",
            )
        ]
    try:
        from disttrain.client.cluster_checks import checks
        from disttrain.client.jobs import Jobs
        from disttrain.kube.api import ApiError, NoCluster
        from disttrain.kube.client import KubeClient, connect, own_namespace
    except ImportError as error:
        return [
            Finding("cluster", Level.NOTE, f"{error}: the verbs of a cluster need it", "pip install 'disttrain[cli]'")
        ]
    logging.getLogger("kubernetes").setLevel(logging.ERROR)  # it warns of what we say

    async def all_checks() -> list[Finding]:
        async with connect(connections=_CONNECTIONS, context=context) as client:
            api = KubeClient(client, timeout_seconds=_TIMEOUT_SECONDS)
            where = Jobs(api, namespace or own_namespace(context)).namespace  # checks the name
            return await checks(api, where)

    try:
        return asyncio.run(all_checks())
    except ApiError as error:
        raise NotReachable(str(of_answer(error, what="say its version", namespace=None))) from error
    except NoCluster as error:
        if asked:
            raise NotReachable(str(error)) from error
        return [Finding("cluster", Level.NOTE, str(error))]


def _is_known() -> bool:
    """Whether there is a kubeconfig, or the account of a pod: without one the client of the cluster, half a second, is not imported."""
    paths = (os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())).split(os.pathsep)
    return "KUBERNETES_SERVICE_HOST" in os.environ or any(Path(path).exists() for path in paths)


def _print(found: Sequence[Finding], output: str) -> None:
    bodies = [one.to_dict() for one in found]
    if output == "json":
        print(json.dumps(bodies, indent=2))
        return
    if output == "yaml":
        import yaml

        print(yaml.safe_dump(bodies, sort_keys=False), end="")
        return
    colour = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    width = max(len(one.check) for one in found)
    for one in found:
        level = f"{one.level.value:<7}"
        level = f"\x1b[{_COLOURS[one.level]}m{level}\x1b[0m" if colour else level
        first, *rest = textwrap.wrap(one.text, _TEXT, break_long_words=False, break_on_hyphens=False) or [""]
        print(f"{level}  {one.check:<{width}}  {first}".rstrip())
        for line in [*rest, *([f"-> {one.mend}"] if one.mend else [])]:
            print(f"{'':7}  {'':{width}}  {line}")
