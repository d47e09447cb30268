"""The models as Python code: what pydantic makes of values, where the API server is not asked."""

from __future__ import annotations

from decimal import Decimal

import pytest
from pydantic import ValidationError

from disttrain.api.job import DistTrainJob
from disttrain.api.pod_parts import EnvVar
from disttrain.api.policies import Observability, RunPolicy
from disttrain.api.reading import read
from disttrain.api.storage import Checkpoint
from disttrain.api.template import PodTemplate
from disttrain.api.trainer import Trainer
from disttrain.api.types import quantity_value

OUR_LOOP: dict[str, object] = {
    "model": "a:b",
    "dataset": "a:b",
    "epochs": 1,
    "optimizer": {"name": "SGD", "learningRate": 1},
}


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        (2, "2"),
        ("500m", "0.5"),
        ("1Ki", "1024"),
        ("4.5Gi", "4831838208"),
        ("1e3", "1000"),
        ("2E", "2e18"),
        (".5k", "500"),
        ("+1n", "1e-9"),
    ],
)
def test_quantities_can_be_compared(quantity: int | str, value: str) -> None:
    assert quantity_value(quantity) == Decimal(value)


def test_null_is_absent_for_known_fields_only() -> None:
    assert RunPolicy.model_validate({"backoffLimit": None}) == RunPolicy()
    assert RunPolicy(backoff_limit=3).to_dict()["backoffLimit"] == 3
    with pytest.raises(ValidationError, match="backofLimit"):
        RunPolicy.model_validate({"backofLimit": None})


def test_a_job_is_read_by_the_names_of_the_api_alone() -> None:
    body = {"metadata": {"name": "j"}, "spec": {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["x"]}}}
    assert DistTrainJob.parse(body | {"spec": body["spec"] | {"runPolicy": {"backoffLimit": 1}}})
    for wrong in ({"run_policy": {}}, {"run_policy": None}, {"runPolicy": {"backoff_limit": 1}}):
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            DistTrainJob.parse(body | {"spec": body["spec"] | wrong})


def test_a_rule_tells_the_value_that_broke_it() -> None:
    with pytest.raises(ValidationError, match=r"metricsPort: ports 29400, .* itself \(got 29500\)"):
        Observability(metrics_port=29500)
    with pytest.raises(ValidationError, match=r"valueFrom: set either value or valueFrom \(name: A\)"):
        EnvVar(name="A", value="b", value_from={"fieldRef": {}})
    with pytest.raises(ValidationError, match=r"deterministic needs consistency Sync.* \(got true\)"):
        DistTrainJob.parse(
            {
                "metadata": {"name": "j"},
                "spec": {
                    "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Async"}},
                    "parameterServer": {},
                    "trainer": {
                        "model": "a:b",
                        "dataset": "a:b",
                        "epochs": 1,
                        "deterministic": True,
                        "optimizer": {"name": "SGD", "learningRate": 1},
                    },
                },
            }
        )


@pytest.mark.parametrize(
    ("trainer", "gpus", "processes"),
    [({"command": ["x"]}, 4, 1), ({"script": {"file": "a.py"}}, 4, 4), ({"command": ["x"]}, 0, 1)],
)
def test_a_command_is_one_process_whatever_its_gpus(trainer: dict[str, object], gpus: int, processes: int) -> None:
    spec = {"strategy": {"type": "DataParallel"}, "trainer": trainer, "worker": {"replicas": 3, "gpusPerWorker": gpus}}
    job = DistTrainJob.parse({"metadata": {"name": "j"}, "spec": spec})
    assert (job.spec.processes_per_worker, job.spec.world_size) == (processes, 3 * processes)


@pytest.mark.parametrize(
    ("worker", "trainer", "field"),
    [
        ({"gpusPerWorker": 2, "processesPerWorker": 3}, {"script": {"file": "a.py"}}, "processesPerWorker"),
        ({"gpusPerWorker": 2, "processesPerWorker": 3}, {"command": ["x"]}, "processesPerWorker"),
        ({"gpusPerWorker": 2, "processesPerWorker": 1}, OUR_LOOP, "processesPerWorker"),
        ({"replicas": 4, "processesPerWorker": 3}, {**OUR_LOOP, "batchSize": 11}, "batchSize"),
        ({"replicas": 4, "processesPerWorker": 0}, {"command": ["x"]}, "processesPerWorker"),
    ],
)
def test_processes_that_do_not_fit_are_refused(
    worker: dict[str, object], trainer: dict[str, object], field: str
) -> None:
    spec = {"strategy": {"type": "DataParallel"}, "trainer": trainer, "worker": worker}
    with pytest.raises(ValidationError, match=field):
        DistTrainJob.parse({"metadata": {"name": "j"}, "spec": spec})


@pytest.mark.parametrize(
    ("worker", "trainer", "world_size"),
    [
        ({"replicas": 4, "processesPerWorker": 3}, {**OUR_LOOP, "batchSize": 12}, 12),
        ({"replicas": 4, "processesPerWorker": 3}, {"script": {"file": "a.py"}}, 12),
        ({"replicas": 4, "gpusPerWorker": 8, "processesPerWorker": 1}, {"script": {"file": "a.py"}}, 4),
        ({"replicas": 4, "processesPerWorker": 3}, {"command": ["x"]}, 4),
    ],
)
def test_the_world_has_the_processes_of_all_workers(
    worker: dict[str, object], trainer: dict[str, object], world_size: int
) -> None:
    spec = {"strategy": {"type": "DataParallel"}, "trainer": trainer, "worker": worker}
    assert DistTrainJob.parse({"metadata": {"name": "j"}, "spec": spec}).spec.world_size == world_size


def test_a_null_within_the_users_own_objects_is_kept() -> None:
    trainer = Trainer.model_validate({"command": ["x"], "config": {"a": None, "b": [None]}})
    assert trainer.to_dict()["config"] == {"a": None, "b": [None]}


def test_what_is_not_typed_in_a_template_is_kept() -> None:
    body = {"spec": {"tolerations": [{"key": "gpu"}], "containers": [{"name": "side", "image": "i", "args": ["x"]}]}}
    assert PodTemplate.model_validate(body).to_dict() == body


def test_a_stored_object_survives_parsing_and_writing() -> None:
    metadata = {
        "name": "j",
        "uid": "u",
        "resourceVersion": "7",
        "finalizers": ["a/b"],
        "creationTimestamp": "2026-01-02T03:04:05Z",
    }
    spec = {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["x"]}}
    again = DistTrainJob.parse(
        {"apiVersion": "disttrain.dev/v1alpha1", "kind": "DistTrainJob", "metadata": metadata, "spec": spec}
    ).to_dict()
    assert again["metadata"] | metadata == again["metadata"]


@pytest.mark.parametrize(
    "origin", ["other", {"job": "other", "include": "Model"}, {"job": "other", "step": 3, "include": "All"}]
)
def test_another_job_to_start_from_is_written_as_it_was_read(origin: object) -> None:
    body = {"volume": {"persistentVolumeClaim": "ckpt"}, "everySteps": 100, "keep": 3, "from": origin}
    checkpoint = Checkpoint.model_validate(body)
    assert checkpoint.from_ is not None
    assert checkpoint.from_.job == "other"
    assert checkpoint.to_dict() == body
    text = checkpoint.model_dump_json(
        by_alias=True, exclude_none=True, exclude_defaults=True
    )  # as DISTTRAIN_JOB has it
    assert Checkpoint.model_validate_json(text).from_ == checkpoint.from_


@pytest.mark.parametrize(
    ("origin", "where"),
    [("Other", "from"), (5, "from"), ({"job": "other", "include": "Half"}, "from.include"), ({"step": 3}, "from")],
)
def test_another_job_to_start_from_that_is_not_understood_is_not_left_out_silently(origin: object, where: str) -> None:
    found = read(Checkpoint, {"volume": {"persistentVolumeClaim": "ckpt"}, "from": origin})
    assert where in found.unreadable


def test_a_copy_with_another_field_describes_the_work_of_that_field() -> None:
    trainer = Trainer.model_validate({"script": {"file": "train.py"}})
    assert trainer.work == trainer.script
    assert trainer.script is not None
    other = trainer.script.model_copy(update={"file": "other.py"})
    assert trainer.model_copy(update={"script": other}).work == other
