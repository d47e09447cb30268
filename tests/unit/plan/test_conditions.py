"""What a user reads: conditions, reasons, messages, the one word."""

import pytest

from disttrain.api.reasons import State
from disttrain.plan.model import Refusal
from unit.plan.builders import created, make_job

UNSUPPORTED = [
    ({"strategy": {"type": "ModelParallel", "modelParallel": {"pipeline": 2}}}, "strategy.type ModelParallel"),
    ({"strategy": {"type": "Hybrid", "modelParallel": {"pipeline": 2}}}, "strategy.type Hybrid"),
    (
        {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}},
        "strategy.dataParallel.sharding",
    ),
    ({"data": {"partitions": 4}}, "data.partitions"),
    ({"data": {"replication": 2}}, "data.replication"),
    ({"data": {"encryption": {"secretName": "key"}}}, "data.encryption"),
    ({"worker": {"replicas": 2, "elastic": {"minReplicas": 1, "maxReplicas": 2}}}, "worker.elastic"),
    ({"scheduling": {"gang": "Volcano"}}, "scheduling.gang"),
    ({"scheduling": {"topologyKey": "rack"}}, "scheduling.topologyKey"),
    ({"network": {"tls": "Mutual"}}, "network.tls Mutual"),
]


@pytest.mark.parametrize(("fields", "named"), [pytest.param(*row, id=row[1]) for row in UNSUPPORTED])
def test_what_is_not_yet_supported_is_named_and_gets_nothing(fields, named):
    scene = make_job().spec(**fields)
    plan = scene.step()
    assert plan.actions == ()
    assert scene.says("Valid") == ("False", "NotYetSupported")
    assert named in scene.condition("Valid").message
    assert [event.reason for event in plan.events] == ["NotYetSupported"]
    assert scene.status.state is State.PENDING
    assert scene.step().events == ()


@pytest.mark.parametrize("strategy", [{"backupWorkers": 1}, {"replication": 2}])
def test_unsupported_parameter_servers(strategy):
    scene = make_job().servers(2, **strategy)
    scene.step()
    assert scene.says("Valid") == ("False", "NotYetSupported")


TO_CREATE = "; create it in the job's namespace, or correct the name in the job"


@pytest.mark.parametrize(
    ("change", "type_", "reason", "message"),
    [
        pytest.param(
            {"reason": "Unschedulable", "message": "0/3 nodes are available: 3 Insufficient cpu."},
            "Scheduled",
            "Unschedulable",
            "digits-worker-1: 0/3 nodes are available: 3 Insufficient cpu.",
            id="no node",
        ),
        pytest.param(
            {"reason": "Unschedulable", "message": 'persistentvolumeclaim "ckpt" not found'},
            "Scheduled",
            "PersistentVolumeClaimNotFound",
            'digits-worker-1: persistentvolumeclaim "ckpt" not found' + TO_CREATE,
            id="no claim",
        ),
        pytest.param(
            {"scheduled": True, "reason": "ErrImagePull", "message": "not authorized"},
            "Ready",
            "ImagePull",
            "digits-worker-1: not authorized; check the image's name, and whether its registry wants an imagePullSecret",
            id="no image",
        ),
        pytest.param(
            {"scheduled": True, "reason": "CreateContainerConfigError", "message": 'secret "aws" not found'},
            "Ready",
            "SecretNotFound",
            'digits-worker-1: secret "aws" not found' + TO_CREATE,
            id="no secret",
        ),
        pytest.param(
            {"scheduled": True, "reason": "CreateContainerConfigError", "message": 'configmap "code" not found'},
            "Ready",
            "ConfigMapNotFound",
            'digits-worker-1: configmap "code" not found' + TO_CREATE,
            id="no config map",
        ),
        pytest.param(
            {
                "scheduled": True,
                "reason": "CreateContainerConfigError",
                "message": "container has runAsNonRoot and image will run as root",
            },
            "Ready",
            "ContainerConfig",
            "digits-worker-1: container has runAsNonRoot and image will run as root",
            id="a container that cannot be made",
        ),
    ],
)
def test_why_it_waits(change, type_, reason, message):
    scene = make_job()
    scene.seen().all_run()
    scene.change(1, **{"phase": "Pending", "ready": False, "scheduled": False, **change}).seen()
    assert scene.says(type_) == ("False", reason)
    assert scene.condition(type_).message == message


def test_waiting_for_peers_tells_for_whom_without_the_running_seconds():
    scene = (
        make_job().started().reports(0, last_update_time=None, waiting_for="worker-1, parameter-server-0 (31 s)").seen()
    )
    assert scene.says("Ready") == ("False", "WaitingForPeers")
    assert scene.condition("Ready").message == "Waiting for worker-1, parameter-server-0"
    before = scene.status
    scene.after(3).reports(0, last_update_time=None, waiting_for="worker-1, parameter-server-0 (34 s)").seen()
    assert scene.status == before


def test_transition_times_change_only_with_the_status():
    scene = make_job().started()
    ready = scene.condition("Ready")
    scene.after(10).reports(5).seen().after(10).metadata(generation=2).seen()
    assert scene.condition("Ready").last_transition_time == ready.last_transition_time
    assert scene.condition("Ready").observed_generation == scene.status.observed_generation == 2
    assert scene.condition("Progressing").last_transition_time > ready.last_transition_time


def test_every_status_has_all_conditions():
    scene = make_job()
    scene.step()
    types = [condition.type for condition in scene.status.conditions]
    assert types == ["Valid", "Suspended", "Scheduled", "Ready", "Progressing", "Restarting", "Complete", "Failed"]


def test_a_refusal_that_may_pass_is_tried_again_later():
    scene = make_job()
    scene.step()
    scene.gone(1)
    scene.refusals = (Refusal(name="digits-worker-1", message="exceeded quota: gpus", retryable=True, time=scene.now),)
    assert created(scene.step()) == []
    assert scene.says("Scheduled") == ("False", "PodRefused")
    assert scene.condition("Scheduled").message == "digits-worker-1: exceeded quota: gpus"
    scene.after(10)
    assert len(created(scene.step())) == 1


def test_a_refusal_that_only_a_change_can_mend_stops_the_making():
    scene = make_job()
    scene.refusals = (
        Refusal(name="digits-master-0", message="spec.nodeSelector: Invalid value", retryable=False, time=scene.now),
    )
    plan = scene.step()
    assert created(plan) == []
    assert scene.says("Valid") == ("False", "PodRefused")
    assert "digits-master-0 was refused: spec.nodeSelector" in scene.condition("Valid").message


def test_a_name_that_somebody_else_holds_is_told_and_nothing_is_made():
    scene = make_job()
    scene.foreign = ("digits",)
    plan = scene.step()
    assert created(plan) == []
    assert scene.says("Valid") == ("False", "NameTaken")
    assert plan.look_again is not None
    scene.foreign = ()
    assert len(created(scene.step())) == 3


def test_a_master_that_falls_silent_makes_the_progress_unknown_not_the_job_stalled():
    scene = make_job().training()
    for _ in range(12):
        scene.after(6).step()
    assert scene.says("Progressing") == ("Unknown", "NoReport")
    assert scene.status.state is State.STARTING or scene.status.state is State.TRAINING
    scene.reports(300).seen()
    assert scene.says("Progressing") == ("True", "Training")


def test_replica_counts():
    scene = make_job().workers(3).servers(1).training().failed(0).succeeded(1).seen()
    counts = {
        status.role: (status.desired, status.ready, status.succeeded, status.failed, status.restarts)
        for status in scene.status.replica_statuses
    }
    assert counts == {"Master": (1, 1, 0, 0, 0), "ParameterServer": (1, 1, 0, 0, 0), "Worker": (3, 1, 1, 1, 1)}
    assert scene.status.worker.ready_replicas == 1
    assert scene.status.worker.selector == "disttrain.dev/job-name=digits,disttrain.dev/role=worker"
