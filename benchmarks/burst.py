"""How fast the operator makes the pods of many jobs at once, against a bare client that sends nothing but the same creations.

    python benchmarks/burst.py [--jobs 200] [--rounds 3]

Both work on one machine against one real API server, controller manager, scheduler and kwok's fake nodes, in turns, in one run: figures of
different machines or runs cannot be compared, ratios can. Each round begins with the same jobs stored and no operator at work. Then either
the operator is let loose (it decides, makes Service, NetworkPolicy and pods, watches them start, writes statuses), or the bare client POSTs
the very manifests. Times and writes are the API server's own, from its audit log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import ssl
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from apiserver.operating import JOBS, PODS, Operator, Rest, eventually, job  # noqa: E402
from cluster.controlplane import ControlPlane  # noqa: E402
from disttrain.api import DistTrainJob  # noqa: E402
from disttrain.api.names import Role  # noqa: E402
from disttrain.manifests import build_network_policy, build_pod, build_service  # noqa: E402

CONCURRENCY = 32
"""Requests in flight, of both."""
PODS_EACH = 4
POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"]},
        {"level": "None"},
    ],
}


@dataclass
class Round:
    """What one side did with one burst."""

    who: str
    pods_per_second: float
    writes: Counter[str] = field(default_factory=Counter)
    cpu_seconds: float = 0.0
    memory_mib: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--idle", type=int, default=10, help="seconds that a busy machine gets before each turn, at most"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="burst-") as folder:
        measure(Path(folder), given.jobs, given.rounds, given.idle)


def measure(folder: Path, jobs: int, number_of_rounds: int, idle_seconds: int) -> None:
    audit = folder / "audit.log"
    (folder / "policy.json").write_text(json.dumps(POLICY))
    flags = [f"--audit-policy-file={folder / 'policy.json'}", f"--audit-log-path={audit}", "--audit-log-mode=batch"]
    with ControlPlane(fake_nodes=10, api_server_flags=flags) as control_plane:
        control_plane.kubectl("apply", "--server-side", "-f", str(ROOT / "crds/disttrainjobs.yaml"))
        eventually(lambda: Rest(control_plane)("GET", JOBS))
        rounds = []
        for number in range(number_of_rounds):
            for who in ("ours", "bare") if number % 2 == 0 else ("bare", "ours"):
                rounds.append(one_round(control_plane, audit, who, f"{who}-{number}", jobs, idle_seconds))
                print(f"  round {number + 1} {who}: {rounds[-1].pods_per_second:.0f} pods/s", flush=True)
    report(rounds, jobs)


def one_round(
    control_plane: ControlPlane, audit: Path, who: str, namespace: str, jobs: int, idle_seconds: int
) -> Round:
    control_plane.kubectl("create", "namespace", namespace)
    rest = Rest(control_plane, namespace)
    eventually(lambda: rest.find("api/v1/{}/serviceaccounts", "default"), seconds=30)
    operator = Operator(control_plane, f"--requests={CONCURRENCY}", name=f"operator-{namespace}")
    if who == "ours":
        operator.start()
        os.kill(operator.program.pid, signal.SIGSTOP)
    stored = [rest.create(JOBS, job(f"job-{i}")) for i in range(jobs)]
    wait_until_idle(idle_seconds)
    if who == "ours":
        used = 0.0
        before = cpu(operator.program.pid)
        begin = time.time()
        os.kill(operator.program.pid, signal.SIGCONT)
    else:
        begin, used = uvloop.run(create_all(control_plane, namespace, stored))
    eventually(lambda: len(rest.list(f"{PODS}", "disttrain.dev/job-name")) >= jobs * PODS_EACH, seconds=300, every=1.0)
    if who == "ours":
        eventually(lambda: all(ready(one) for one in rest.list(JOBS)), seconds=300, every=2.0)
    time.sleep(3)  # the audit log is written in batches
    created, writes = read_audit(audit, namespace, begin)
    result = Round(who, len(created) / (max(created) - begin), writes, cpu_seconds=used)
    if who == "ours":
        result.cpu_seconds = cpu(operator.program.pid) - before
        result.memory_mib = memory(operator.program.pid)
        operator.kill()
    rest("DELETE", JOBS, {"propagationPolicy": "Background"})
    eventually(lambda: not rest.list(PODS), seconds=300, every=2.0)
    wait_until_idle(idle_seconds)
    return result


def ready(stored: Any) -> bool:
    """Whether the status says that all pods are ready. (The job is not: nothing trains on kwok's nodes.)"""
    return sum(role["ready"] for role in stored.get("status", {}).get("replicaStatuses", ())) == PODS_EACH


async def create_all(control_plane: ControlPlane, namespace: str, stored: list[Any]) -> tuple[float, float]:
    """The bare client: the same objects, as fast as asyncio and aiohttp can send them. When it began, and the CPU seconds that it took.

    It decides nothing: what it sends is made before, and its connections are open, as the operator's are.
    """
    pki = control_plane.folder / "pki"
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
    slots = asyncio.Semaphore(CONCURRENCY)
    connector = aiohttp.TCPConnector(limit=CONCURRENCY, ssl=context)
    requests = [request for body in stored for request in requests_of(DistTrainJob.parse(body), namespace)]
    async with aiohttp.ClientSession(control_plane.server, connector=connector) as session:

        async def create(path: str, body: bytes) -> None:
            headers = {"Content-Type": "application/json"}
            async with slots, session.post(path, data=body, headers=headers) as answer:
                answer.raise_for_status()
                await answer.json()

        async def connect() -> None:
            async with session.get("/version") as answer:
                await answer.read()

        await asyncio.gather(*(connect() for _ in range(CONCURRENCY)))
        begin, used = time.time(), time.process_time()
        await asyncio.gather(*(create(path, body) for path, body in requests))
        return begin, time.process_time() - used


def requests_of(described: DistTrainJob, namespace: str) -> Iterator[tuple[str, bytes]]:
    """The path and the body of each creation of a job."""
    core = f"/api/v1/namespaces/{namespace}"
    policies = f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies"
    yield f"{core}/services", json.dumps(build_service(described)).encode()
    yield policies, json.dumps(build_network_policy(described)).encode()
    for role, index in ((Role.MASTER, 0), (Role.PARAMETER_SERVER, 0), (Role.WORKER, 0), (Role.WORKER, 1)):
        yield f"{core}/pods", json.dumps(build_pod(described, role, index, 1, trainer_image="x")).encode()


def read_audit(audit: Path, namespace: str, begin: float) -> tuple[list[float], Counter[str]]:
    """When each pod of the namespace was created, and what the operator wrote there."""
    created, writes = [], Counter[str]()
    with audit.open() as lines:
        for line in lines:
            if f'"{namespace}"' not in line:
                continue
            entry = json.loads(line)
            where = entry.get("objectRef", {})
            if where.get("namespace") != namespace or entry["responseStatus"]["code"] >= 300:
                continue
            time_ = datetime.fromisoformat(entry["stageTimestamp"]).timestamp()
            if (
                entry["verb"] == "create"
                and where["resource"] == "pods"
                and not where.get("subresource")
                and time_ >= begin
            ):
                created.append(time_)
            if entry.get("userAgent", "").startswith("disttrain-operator"):
                writes["/".join(filter(None, (where["resource"], where.get("subresource")))) + " " + entry["verb"]] += 1
    return created, writes


def wait_until_idle(idle_seconds: int) -> None:
    """Waits until the machine has little else to do, so that a round does not pay for the one before; at most `idle_seconds`."""
    for _ in range(idle_seconds):
        busy, total = processor()
        time.sleep(1)
        busy_after, total_after = processor()
        if (busy_after - busy) / max(1, total_after - total) < 0.25:
            return


def processor() -> tuple[int, int]:
    ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def cpu(pid: int) -> float:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def report(rounds: list[Round], jobs: int) -> None:
    ours = [one for one in rounds if one.who == "ours"]
    bare = [one for one in rounds if one.who == "bare"]
    print(
        f"\n{jobs} jobs of {PODS_EACH} pods, {CONCURRENCY} requests in flight, {len(ours)} rounds in turns; median (least to most)\n"
    )
    rows = [
        ("pods created per second, operator", spread([one.pods_per_second for one in ours], "{:.0f}")),
        ("pods created per second, bare client", spread([one.pods_per_second for one in bare], "{:.0f}")),
        (
            "operator / bare client",
            spread([a.pods_per_second / b.pods_per_second for a, b in zip(ours, bare, strict=True)], "{:.2f}")
            + "; target >= 0.5",
        ),
        (
            "operator's CPU per job, ms, until all pods are ready",
            spread([1000 * one.cpu_seconds / jobs for one in ours], "{:.1f}"),
        ),
        ("bare client's CPU per job, ms", spread([1000 * one.cpu_seconds / jobs for one in bare], "{:.1f}")),
        ("operator's peak memory, MiB", spread([one.memory_mib for one in ours], "{:.0f}")),
        ("API writes per job", spread([sum(one.writes.values()) / jobs for one in ours], "{:.2f}")),
    ]
    kinds = sorted({kind for one in ours for kind in one.writes})
    rows += [(f"  {kind}", spread([one.writes[kind] / jobs for one in ours], "{:.2f}")) for kind in kinds]
    for name, value in rows:
        print(f"{name:52} {value}")


def spread(values: list[float], form: str) -> str:
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


if __name__ == "__main__":
    main()
