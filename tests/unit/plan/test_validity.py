"""What this version does not carry out yet: named, pointed at, and nothing is made of it."""

import pytest

from disttrain.api.reasons import JobState
from disttrain.plan.validity import UNSUPPORTED, unsupported, unsupported_fields
from unit.plan.builders import make_job

ELASTIC = {"elastic": {"minReplicas": 1, "maxReplicas": 2}}
FROM = {"volume": {"persistentVolumeClaim": "ckpt"}, "from": "other"}
LOOP = {
    "model": "m:m",
    "dataset": "m:d",
    "evaluate": "m:e",
    "optimizer": {"name": "SGD", "learningRate": 0.1},
    "epochs": 1,
}
EVALUATED = LOOP | {"evaluateEverySteps": 10}
BEST = {"volume": {"persistentVolumeClaim": "ckpt"}, "keepBest": {"metric": "accuracy", "mode": "Max"}}
HYBRID = {"type": "Hybrid", "modelParallel": {"tensor": 2}}
ROWS = [
    (make_job().servers(3, replication=3), "strategy.parameterServer.replication", "above 2"),
    (make_job().script().spec(checkpoint=FROM), "checkpoint.from", "of a script or command"),
    (make_job().command().spec(checkpoint=FROM), "checkpoint.from", "of a script or command"),
    (
        make_job().servers(2, replication=2).spec(trainer=LOOP | {"nanPolicy": {"rollBacks": 1}}),
        "trainer.nanPolicy",
        "with strategy.parameterServer.replication above 1",
    ),
    (
        make_job().servers(1, consistency="Async").spec(trainer=EVALUATED, checkpoint=BEST),
        "checkpoint.keepBest",
        "with consistency Async or BoundedStaleness",
    ),
    (
        make_job().spec(worker=ELASTIC, trainer=EVALUATED),
        "trainer.evaluateEverySteps",
        "with worker.elastic and DataParallel",
    ),
    (
        make_job().spec(worker=ELASTIC, strategy={"dataParallel": {"sharding": "FullyShard"}}),
        "worker.elastic",
        "of a model that is cut over its workers",
    ),
    *(
        (
            make_job()
            .workers(4)
            .servers(2)
            .spec(strategy=HYBRID | {"parameterServer": {"consistency": "Sync", **served}}, trainer=trainer),
            field,
            "with strategy.type Hybrid and parameterServer",
        )
        for field, served, trainer in (
            ("strategy.parameterServer.backupWorkers", {"backupWorkers": 1}, {}),
            ("strategy.parameterServer.localSteps", {"localSteps": 2, "outerOptimizer": {}}, {}),
            ("strategy.parameterServer.compression", {"compression": {"type": "BFloat16"}}, {}),
        )
    ),
    (make_job().spec(scheduling={"gang": "Kueue"}), "scheduling.gang", "Kueue or Native"),
    (make_job().spec(scheduling={"gang": "Native"}), "scheduling.gang", "Kueue or Native"),
    (
        make_job().spec(
            scheduling={"gang": "Coscheduling"},
            master={"template": {"spec": {"schedulerName": "default-scheduler"}}},
            worker={"replicas": 2, "template": {"spec": {"schedulerName": "mine"}}},
        ),
        "scheduling.gang",
        "of pods with different schedulerName",
    ),
    (
        make_job().spec(scheduling={"timeoutSeconds": 60}),
        "scheduling.timeoutSeconds",
        "other than 600 without worker.elastic or a gang",
    ),
]


@pytest.mark.parametrize(
    ("scene", "field", "what"), ROWS, ids=[f"{row[1]}-{number}" for number, row in enumerate(ROWS)]
)
def test_what_is_not_yet_supported_is_named_and_gets_nothing(scene, field, what):
    words = f"{field} {what}".strip()
    plan = scene.step()
    assert plan.actions == ()
    assert scene.says("Valid") == ("False", "NotYetSupported")
    assert scene.condition("Valid").message == f"Not supported by this version: {words}"
    assert [event.reason for event in plan.events] == ["NotYetSupported"]
    assert scene.status.state is JobState.PENDING
    assert scene.step().events == ()
    assert unsupported_fields(scene.job.spec) == ((tuple(field.split(".")), words),)
    assert unsupported(scene.job.spec) == (words,)


def test_the_table_holds_everything_that_is_not_supported():
    met = {entry.words for entry in UNSUPPORTED for scene, _, _ in ROWS if entry.asked_for(scene.job.spec)}
    assert met == {entry.words for entry in UNSUPPORTED}


def test_a_path_leads_to_a_field_of_the_spec():
    for scene, field, _ in ROWS:
        value = scene.job.spec.model_dump(by_alias=True)
        for key in field.split("."):
            assert key in value
            value = value[key]


@pytest.mark.parametrize(
    "scene",
    [
        make_job(),
        make_job().servers(2),
        make_job().script(),
        make_job().command(),
        make_job().spec(worker=ELASTIC, scheduling={"timeoutSeconds": 60}),
    ],
)
def test_a_plain_job_asks_for_nothing_of_it(scene):
    assert unsupported_fields(scene.job.spec) == ()


IDLE = "2 of 4 worker processes have nothing to do in a step: it has 2 parts (trainer.partsPerStep)"


@pytest.mark.parametrize(
    ("scene", "warning"),
    [
        (make_job().spec(worker={"replicas": 4}).spec(trainer={"partsPerStep": 2}), IDLE),
        (make_job().spec(trainer={"partsPerStep": 2}, worker={"processesPerWorker": 2}), IDLE),
        (
            make_job().spec(worker={"replicas": 4}).servers(2, consistency="Sync").spec(trainer={"partsPerStep": 2}),
            IDLE,
        ),
        (make_job().spec(worker={"replicas": 4}).servers(2, consistency="Async").spec(trainer={"partsPerStep": 2}), ""),
        (make_job().spec(worker={"replicas": 4}).spec(trainer={"partsPerStep": 4}), ""),
        (make_job().spec(worker={"replicas": 4}), ""),
        (make_job().spec(worker={"replicas": 4}).script(), ""),
    ],
)
def test_workers_that_have_no_part_of_a_step_are_warned_of(scene, warning):
    scene.step()
    assert scene.says("Valid") == ("True", "Accepted")
    assert warning in scene.condition("Valid").message
    assert ("nothing to do" in scene.condition("Valid").message) is bool(warning)


def test_a_job_that_got_more_workers_than_its_steps_have_parts_is_warned_of_them():
    scene = make_job()
    scene.step()
    scene.status = scene.status.model_copy(update={"parts_per_step": 2})
    scene.spec(worker={"replicas": 4}).step()
    assert IDLE in scene.condition("Valid").message
