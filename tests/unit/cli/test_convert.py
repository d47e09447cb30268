"""`disttrain convert`: what becomes of the jobs of other operators, and what is said of the rest, with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from disttrain.cli.main import main

PYTORCH = """\
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: mnist, namespace: team, labels: {a: b}}
spec:
  nprocPerNode: "2"
  elasticPolicy: {minReplicas: 1, maxReplicas: 3, maxRestarts: 9, rdzvBackend: c10d}
  runPolicy:
    cleanPodPolicy: None
    ttlSecondsAfterFinished: 60
    schedulingPolicy: {queue: fast, priorityClass: high}
  pytorchReplicaSpecs:
    Master: &role
      replicas: 1
      restartPolicy: Never
      template: &template
        spec:
          restartPolicy: Never
          nodeSelector: {pool: gpu}
          containers:
          - {name: sidecar, image: "proxy:1"}
          - name: pytorch
            image: team/mnist:1
            command: [python, mnist.py]
            args: [--epochs=1]
            ports: [{name: pytorchjob-port, containerPort: 23456}]
            env: [{name: LEVEL, value: info}, {name: RANK, value: "0"}]
            resources: {limits: {nvidia.com/gpu: 2, cpu: 4}}
    Worker:
      replicas: 3
      restartPolicy: Never
      template: *template
"""
TF = """\
apiVersion: kubeflow.org/v1
kind: TFJob
metadata: {name: dist-mnist}
spec:
  tfReplicaSpecs:
    PS: {replicas: 2, template: {spec: {containers: [{name: tensorflow, image: "tf:1", resources: {requests: {memory: 1Gi}}}]}}}
    Chief: {replicas: 1, template: {spec: {containers: [{name: tensorflow, image: "tf:1"}]}}}
    Worker: {replicas: 4, restartPolicy: ExitCode, template: {spec: {containers: [{name: tensorflow, image: "tf:1"}]}}}
    Evaluator: {replicas: 1, template: {spec: {containers: [{name: tensorflow, image: "tf:1"}]}}}
"""
TRAIN = """\
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata: {name: My_Train_Job}
spec:
  runtimeRef: {name: torch-distributed}
  suspend: true
  trainer:
    numNodes: 3
    numProcPerNode: 4
    command: [torchrun, train.py]
    resourcesPerNode: {limits: {cpu: "2", nvidia.com/gpu: 4}}
  runtimePatches:
  - manager: team.example/platform
    trainingRuntimeSpec:
      template:
        metadata: {labels: {team: a}}
        spec:
          replicatedJobs:
          - {name: node, template: {spec: {template: {spec: {nodeSelector: {pool: gpu}}}}}}
"""
RAY = """\
apiVersion: ray.io/v1
kind: RayJob
metadata: {name: ray}
spec:
  entrypoint: python "my train.py" --depth 3
  rayClusterSpec:
    headGroupSpec: {template: {spec: {containers: [{name: ray-head, image: "ray:2"}]}}}
    workerGroupSpecs:
    - {replicas: 2, groupName: a, template: {spec: {containers: [{name: ray-worker, image: "ray:2"}]}}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: beside}
data: {a: b}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def converted(text: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], str]:
    """The objects of the result, and what was said."""
    Path("theirs.yaml").write_text(text)
    assert main(["convert", "theirs.yaml", "-o", "ours.yaml"]) == 0
    printed = capsys.readouterr()
    assert main(["lint", "ours.yaml"]) == 0
    capsys.readouterr()
    return list(yaml.safe_load_all(Path("ours.yaml").read_text())), printed.err


def test_a_pytorch_job_is_a_command_in_as_many_workers(capsys: pytest.CaptureFixture[str]) -> None:
    (job,), said = converted(PYTORCH, capsys)
    assert job["metadata"] == {"name": "mnist", "namespace": "team", "labels": {"a": "b"}}
    assert job["spec"] == {
        "image": "team/mnist:1",
        "strategy": {"type": "DataParallel"},
        "trainer": {"command": ["python", "mnist.py", "--epochs=1"]},
        "worker": {
            "replicas": 4,
            "gpusPerWorker": 2,
            "processesPerWorker": 2,
            "template": {
                "spec": {
                    "nodeSelector": {"pool": "gpu"},
                    "containers": [
                        {
                            "name": "trainer",
                            "env": [{"name": "LEVEL", "value": "info"}],
                            "resources": {"limits": {"cpu": 4}},
                        },
                        {"name": "sidecar", "image": "proxy:1"},
                    ],
                }
            },
        },
        "runPolicy": {"backoffLimit": 9, "ttlSecondsAfterFinished": 60, "cleanPodPolicy": "None"},
        "scheduling": {"priorityClassName": "high"},
        "failurePolicy": {"defaultAction": "FailJob"},
    }
    assert "theirs.yaml:10: spec.runPolicy.schedulingPolicy.queue: has no counterpart in a DistTrainJob\n" in said
    assert "elasticPolicy.minReplicas: is left out: a command has a fixed number of workers" in said
    assert "RANK is left out: DistTrain sets it" in said
    assert "image team/mnist:1 must have DistTrain's trainer installed" in said


def test_a_tf_job_keeps_its_servers_and_asks_for_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    (job,), said = converted(TF, capsys)
    spec = job["spec"]
    assert (spec["strategy"]["type"], spec["parameterServer"]["replicas"], spec["worker"]["replicas"]) == (
        "ParameterServer",
        2,
        5,
    )
    assert spec["parameterServer"]["template"]["spec"]["containers"][0]["resources"] == {"requests": {"memory": "1Gi"}}
    for expected in ("is TensorFlow", "Evaluator: is left out", "a Chief is one of the workers", "ExitCode: "):
        assert expected in said


def test_a_train_job_takes_the_patches_of_its_nodes_along(capsys: pytest.CaptureFixture[str]) -> None:
    (job,), said = converted(TRAIN, capsys)
    spec = job["spec"]
    assert job["metadata"]["name"] == "my-train-job"
    assert (spec["suspend"], spec["trainer"]["command"]) == (True, ["torchrun", "train.py"])
    assert {name: spec["worker"][name] for name in ("replicas", "processesPerWorker", "gpusPerWorker")} == {
        "replicas": 3,
        "processesPerWorker": 4,
        "gpusPerWorker": 4,
    }
    assert spec["worker"]["template"]["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert "what the runtime torch-distributed sets" in said
    assert "trainingRuntimeSpec.template.metadata: has no counterpart" in said


def test_a_ray_job_is_its_entry_point_and_what_is_beside_it_stays(capsys: pytest.CaptureFixture[str]) -> None:
    (job, beside), said = converted(RAY, capsys)
    assert job["spec"]["trainer"] == {"command": ["python", "my train.py", "--depth", "3"]}
    assert job["spec"]["worker"] == {"replicas": 2}
    assert beside["kind"] == "ConfigMap"
    assert "no Ray cluster is there" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1", "theirs.yaml: holds no job that can be converted: PyTorchJob, TFJob, TrainJob, RayJob"),
        ("a: [", "theirs.yaml:1: "),
        (
            "apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nmetadata: [a]\nspec: 3\n",
            "is no PyTorchJob that its operator",
        ),
        ("apiVersion: ray.io/v1\nkind: RayJob\nspec: {rayClusterSpec: {workerGroupSpecs: {a: 1}}}\n", "RayJob"),
    ],
)
def test_wrong_input_is_said_in_lines_without_a_result(
    text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("theirs.yaml").write_text(text)
    assert main(["convert", "theirs.yaml"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
