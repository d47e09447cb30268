"""The console script where it cannot begin, or is asked to end before it has: one line, an exit code, no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.processes import wait_for

PROMPT = 10.0
"""Seconds for an end in which there is nothing to put in order. One that waited for an answer of the API server would take `NEVER`."""
NEVER = 60


def kubeconfig(folder: Path, server: str) -> Path:
    file = folder / "kubeconfig"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {}}],
    }
    file.write_text(json.dumps(config))
    return file


def start(config: Path, *flags: str) -> subprocess.Popen[str]:
    argv = [str(Path(sys.executable).with_name("disttrain-operator")), "--host=127.0.0.1", *flags]
    argv.append(f"--request-timeout-seconds={NEVER}")
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**os.environ, "KUBECONFIG": str(config)})


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_port_that_is_taken_is_one_line_that_says_what_to_do(tmp_path: Path, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    operator = start(kubeconfig(tmp_path, "http://127.0.0.1:9"), f"--port={port}")
    (line,) = operator.communicate(timeout=20)[1].splitlines()
    assert line == (
        f"disttrain-operator: cannot listen on 127.0.0.1:{port}: Address already in use; "
        "choose another with --port or --host, 0 for any free port"
    )
    assert operator.returncode == 2


@pytest.mark.parametrize("content", ["a: [b", "", "hello"], ids=["no YAML", "empty", "no mapping"])
def test_file_that_is_no_kubeconfig_is_one_line(tmp_path: Path, content: str) -> None:
    (config := tmp_path / "kubeconfig").write_text(content)
    operator = start(config, "--port=0")
    (line,) = operator.communicate(timeout=20)[1].splitlines()
    assert line.startswith("disttrain-operator: no cluster: ")
    assert "KUBECONFIG" in line
    assert operator.returncode == 2


def asked_to_end(operator: subprocess.Popen[str]) -> str:
    """The rest of the log of an operator that gets SIGTERM now, and that has to take it well."""
    began = time.monotonic()
    operator.send_signal(signal.SIGTERM)
    rest = operator.communicate(timeout=20)[1]
    assert time.monotonic() - began < PROMPT
    assert "Traceback" not in rest
    assert operator.returncode == 0
    return rest


def handles_sigterm(process: subprocess.Popen[str]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> signal.SIGTERM - 1 & 1)


@pytest.mark.parametrize("moment", [0.0, 0.2, 0.5])
def test_sigterm_while_it_is_loaded(tmp_path: Path, moment: float) -> None:
    operator = start(kubeconfig(tmp_path, "http://127.0.0.1:9"), "--port=0")
    wait_for("its first line", lambda: handles_sigterm(operator), 20)
    time.sleep(moment)  # no waiting for something: the moment is the input of this test
    asked_to_end(operator)


@pytest.mark.parametrize("answers", [False, True], ids=["refuses", "never answers"])
@pytest.mark.parametrize("flags", [[], ["--leader-elect"]], ids=["first list", "Lease"])
def test_sigterm_while_the_api_server(
    tmp_path: Path, listener: socket.socket, *, flags: list[str], answers: bool
) -> None:
    port = listener.getsockname()[1]
    if not answers:
        listener.close()
    operator = start(kubeconfig(tmp_path, f"http://127.0.0.1:{port}"), "--port=0", *flags)
    assert operator.stderr
    awaited = "waiting for the Lease" if flags else "on port"
    next(line for line in operator.stderr if awaited in line)
    with contextlib.ExitStack() as connections:
        if answers:
            connections.enter_context(listener.accept()[0])  # its request is on the way
        assert "received a signal before the start was complete; ending" in asked_to_end(operator)


def test_it_lives_and_is_not_ready_while_the_first_list_hangs(tmp_path: Path, listener: socket.socket) -> None:
    operator = start(kubeconfig(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}"), "--port=0")
    assert operator.stderr
    port = next(line for line in operator.stderr if "on port" in line).split()[-1]
    connection, _ = listener.accept()  # the list is asked for, and that is all
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
        assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5)
    with refused.value as error:
        assert (error.code, error.read()) == (500, b"first list: not yet read\n")
    with connection:
        asked_to_end(operator)
