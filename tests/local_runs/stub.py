"""A trainer without a training: what `python -m disttrain_trainer` starts when PYTHONPATH begins with the folder that holds it.

The master serves the progress of its configuration, later that in the file `later`, and each time adds an x to the file `asked`;
servers wait, workers do what the job's config says: so local runs can be tested in milliseconds, and fail as no training would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TRAINER = """
import datetime, http.server, json, os, signal, sys, threading, time, urllib.request

job = json.loads(os.environ["DISTTRAIN_JOB"])
addresses = job.get("tlsAddresses", job["addresses"])  # as JobConfig.encode has it
role, index = os.environ["DISTTRAIN_ROLE"], os.environ["DISTTRAIN_INDEX"]
config = job["trainer"].get("config", {})
print(f"{role} {index} of attempt {os.environ['DISTTRAIN_ATTEMPT']} is here", flush=True)

if role == "master":
    done = set()
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/done/"):
                done.add(self.path)
            if self.path == "/progress":
                with open("asked", "a") as asked:
                    asked.write("x")
            now = datetime.datetime.now(datetime.timezone.utc).isoformat()
            report = {"attempt": job["attempt"], "worldSize": job["workers"], "lastUpdateTime": now} | config.get("progress", {})
            if os.path.exists("later"):
                report |= json.load(open("later"))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(report).encode())
            if len(done) == job["workers"]:
                threading.Thread(target=server.shutdown).start()
        def log_message(self, *_):
            pass
    def terminated(*_):
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        report = {"attempt": job["attempt"], "worldSize": job["workers"], "lastUpdateTime": now}
        if "saved" in config:
            report |= {"step": config["saved"], "lastCheckpoint": {"step": config["saved"], "time": now}}
        with open(os.environ["DISTTRAIN_TERMINATION_LOG"], "w") as said:
            json.dump({"message": "ended by SIGTERM", "progress": report}, said)
        sys.exit(143)
    signal.signal(signal.SIGTERM, terminated)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["DISTTRAIN_METRICS_PORT"])), Handler)
    control = http.server.ThreadingHTTPServer(("127.0.0.1", int(addresses["control"].split(":")[1])), Handler)
    threading.Thread(target=control.serve_forever, daemon=True).start()
    server.serve_forever()
elif role == "parameter-server":
    signal.pause()
else:
    exec(config.get(f"worker-{index}") or config.get("worker", ""))
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://{addresses['control']}/done/{index}").close()
            break
        except OSError:
            time.sleep(0.05)
with open(os.environ["DISTTRAIN_TERMINATION_LOG"], "w") as said:
    said.write('{"done": true}')
"""


def install(folder: Path) -> None:
    """Puts the stub where `python -m disttrain_trainer` finds it first."""
    package = folder / "disttrain_trainer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(TRAINER)


def write_job(
    folder: Path,
    *documents: dict[str, Any],
    name: str = "stub",
    config: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **spec: Any,
) -> str:
    """A job file for the stub, with documents beside the job; its name. trainer: further fields of it; with a command, all of them."""
    ours = {
        "model": "disttrain_trainer:model",
        "dataset": "disttrain_trainer:dataset",
        "optimizer": {"name": "SGD", "learningRate": 0.1},
        "epochs": 1,
        "config": config or {},
    }
    strategy = {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}}
    body = {
        "apiVersion": "disttrain.dev/v1alpha1",
        "kind": "DistTrainJob",
        "metadata": {"name": name},
        "spec": {
            "strategy": strategy,
            "trainer": trainer if trainer and "command" in trainer else ours | (trainer or {}),
            "parameterServer": {"replicas": 1},
            "worker": {"replicas": 2},
        }
        | spec,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump_all([body, *documents], sort_keys=False))
    return f"{name}.yaml"


def write_command(folder: Path, *command: str, **spec: Any) -> str:
    """A job file for a command of one worker; its name."""
    trainer = {"command": list(command)}
    return write_job(
        folder,
        strategy={"type": "DataParallel"},
        trainer=trainer,
        **{"parameterServer": None, "worker": {"replicas": 1}, **spec},
    )
