"""deploy/kind/*.sh, run against stand-ins for docker, kind and kubectl that write down how they were called."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KIND = ROOT / "deploy" / "kind"
TOOLS = ("bash", "dirname", "env", "grep", "sed", "cat")
PROGRAMS = ("docker", "kind", "kubectl")
FIELDS = "KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name,STATE:.status.state"
STAND_IN = """#!/usr/bin/env bash
echo "{name} $*" >> "$CALLS"
case "{name} $*" in
  "kind get clusters") echo "$CLUSTERS" ;;
  "kind create cluster"*) cat > "$CALLS.cluster" ;;
  "docker info") exit "${{DAEMON:-0}}" ;;
  "docker buildx version") exit "${{BUILDX:-0}}" ;;
  "docker port disttrain-control-plane 30300/tcp") [ -n "$MAPPED" ] && printf '%b\n' "$MAPPED" ;;
  *"get -f"*) printf '%b' "$EXISTING" ;;
  *"get deployment"*"disttrain-system"*) echo deployment.apps/disttrain-operator ;;
  *"get deployment"*) echo deployment.apps/prometheus; echo deployment.apps/grafana ;;
  *"rollout status deployment.apps/grafana"*) exit "${{GRAFANA:-0}}" ;;
esac
"""


class Machine:
    """A PATH with what the scripts may use, and nothing of this machine's own docker or kubectl."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None
            (self.bin / tool).symlink_to(found)
        for name in PROGRAMS:
            path = self.bin / name
            path.write_text(STAND_IN.format(name=name))
            path.chmod(0o755)

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        example = {"EXAMPLE": "deploy/kind/cluster.yaml"}  # any file that exists
        return subprocess.run(
            [KIND / script],
            env={
                "PATH": str(self.bin),
                "CALLS": str(self.calls_file),
                "CLUSTERS": "other",
                "MAPPED": "127.0.0.1:3000",
                **example,
                **environment,
            },
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_up_creates_builds_loads_installs_waits_and_starts_in_that_order(machine: Machine) -> None:
    done = machine.run("up.sh")
    assert (done.returncode, done.stderr) == (0, "")
    cluster = "kubectl --context kind-disttrain"
    assert machine.calls == [
        "docker buildx version",
        "docker info",
        "kind get clusters",
        "kind create cluster --config - --wait 120s",
        "docker build --target operator --tag disttrain/operator:dev .",
        "kind load docker-image disttrain/operator:dev --name disttrain",
        "docker build --target trainer --tag disttrain/trainer:dev .",
        "kind load docker-image disttrain/trainer:dev --name disttrain",
        f"{cluster} apply -k deploy/overlays/kind",
        f"{cluster} get deployment --namespace disttrain-system --output name",
        f"{cluster} rollout status deployment.apps/disttrain-operator --namespace disttrain-system --timeout=300s",
        f"{cluster} get deployment --namespace disttrain-monitoring --output name",
        f"{cluster} rollout status deployment.apps/prometheus --namespace disttrain-monitoring --timeout=300s",
        f"{cluster} rollout status deployment.apps/grafana --namespace disttrain-monitoring --timeout=300s",
        f"{cluster} get -f deploy/kind/cluster.yaml --ignore-not-found --no-headers --output custom-columns={FIELDS}",
        f"{cluster} apply -f deploy/kind/cluster.yaml",
    ]
    assert "Grafana: http://localhost:3000" in done.stdout
    assert "get dtj --watch" in done.stdout


def test_up_again_uses_the_cluster_and_restarts_the_operator_for_the_new_image(machine: Machine) -> None:
    done = machine.run("up.sh", CLUSTERS="disttrain")
    assert done.returncode == 0
    assert not [call for call in machine.calls if call.startswith("kind create")]
    assert "kubectl --context kind-disttrain rollout restart deployment --namespace disttrain-system" in machine.calls


@pytest.mark.parametrize("given", [{}, {"GRAFANA_PORT": "3300"}], ids=["none given", "the same given"])
def test_up_again_names_the_port_that_the_cluster_maps(machine: Machine, given: dict[str, str]) -> None:
    done = machine.run("up.sh", CLUSTERS="disttrain", MAPPED="127.0.0.1:3300\\n[::1]:3300", **given)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Grafana: http://localhost:3300 " in done.stdout


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        pytest.param({"GRAFANA_PORT": "4000"}, "has Grafana on port 3000: leave GRAFANA_PORT out", id="another port"),
        pytest.param({"MAPPED": ""}, "maps no port for Grafana", id="another user's cluster"),
    ],
)
def test_a_port_that_the_cluster_does_not_map_is_refused_before_anything_is_built(
    machine: Machine, environment: dict[str, str], words: str
) -> None:
    done = machine.run("up.sh", CLUSTERS="disttrain", **environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [call for call in machine.calls if call.startswith(("docker build ", "kubectl"))]


@pytest.mark.parametrize("state", ["Complete", "Failed"])
def test_up_again_trains_a_finished_example_again(machine: Machine, state: str) -> None:
    rows = f"PersistentVolumeClaim   default   ckpt     <none>\\nDistTrainJob            default   digits   {state}\\n"
    machine.run("up.sh", CLUSTERS="disttrain", EXISTING=rows)
    after = machine.calls[-2:]
    assert after[0] == "kubectl --context kind-disttrain delete disttrainjob digits --namespace default"
    assert after[1].startswith("kubectl --context kind-disttrain apply -f ")


def test_up_again_leaves_an_example_that_trains(machine: Machine) -> None:
    done = machine.run("up.sh", CLUSTERS="disttrain", EXISTING="DistTrainJob   default   digits   Training\\n")
    assert not [call for call in machine.calls if " delete " in call]
    assert "the job digits is in work" in done.stdout


def test_grafanas_port_can_be_chosen(machine: Machine) -> None:
    done = machine.run("up.sh", GRAFANA_PORT="3300")
    assert "http://localhost:3300" in done.stdout
    assert "hostPort: 3300" in Path(f"{machine.calls_file}.cluster").read_text()


def test_torch_can_come_from_another_index(machine: Machine) -> None:
    machine.run("up.sh", TORCH_INDEX="https://example.invalid/cpu")
    assert (
        "docker build --target trainer --tag disttrain/trainer:dev --build-arg TORCH_INDEX=https://example.invalid/cpu ."
        in machine.calls
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_missing_program_is_reported_in_one_line_before_anything_is_done(machine: Machine, name: str) -> None:
    (machine.bin / name).unlink()
    done = machine.run("up.sh")
    assert done.returncode == 2
    assert done.stderr.startswith(f"make kind: {name} is not installed")
    assert done.stderr.count("\n") == 1
    assert machine.calls == []


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        pytest.param({"DAEMON": "1"}, "its daemon does not answer", id="docker is not started"),
        pytest.param({"BUILDX": "1"}, "docker lacks its buildx plugin", id="no buildx"),
        pytest.param({"EXAMPLE": "examples/none.yaml"}, "there is no file examples/none.yaml", id="no example"),
        pytest.param({"GRAFANA_PORT": "80/tcp"}, "GRAFANA_PORT=80/tcp is not a port", id="no port"),
    ],
)
def test_wrong_input_is_reported_in_one_line(machine: Machine, environment: dict[str, str], words: str) -> None:
    done = machine.run("up.sh", **environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [call for call in machine.calls if call.startswith("kind")]


def test_a_pod_that_does_not_become_ready_is_named_with_how_to_look(machine: Machine) -> None:
    done = machine.run("up.sh", GRAFANA="1")
    assert done.returncode == 2
    assert (
        "deployment.apps/grafana did not become ready: kubectl --context kind-disttrain describe pods -n disttrain-monitoring"
        in done.stderr
    )


def test_the_example_that_up_starts_exists() -> None:
    assert (ROOT / "examples" / "digits-ps.yaml").is_file()


def test_down_deletes_the_cluster(machine: Machine) -> None:
    assert machine.run("down.sh").returncode == 0
    assert machine.calls == ["kind delete cluster --name disttrain"]


def test_down_without_kind_says_so(machine: Machine) -> None:
    (machine.bin / "kind").unlink()
    done = machine.run("down.sh")
    assert (done.returncode, done.stderr) == (
        2,
        "make kind-down: kind is not installed, so there is no cluster to delete\n",
    )


@pytest.mark.parametrize("script", sorted(KIND.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & 0o111
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True, timeout=30)
