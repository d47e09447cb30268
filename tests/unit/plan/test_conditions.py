"""What a user reads: conditions, reasons, messages, the one word."""

from datetime import timedelta

import pytest

from disttrain.api import Termination
from disttrain.api.reasons import JobState
from disttrain.plan.model import Phase, Trouble
from unit.plan.builders import NOON, make_job

TO_CREATE = "; create it in the job's namespace, or correct the name in the job"
ELSEWHERE = 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) digits-master-0'


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
            {
                "scheduled": True,
                "reason": "CreateContainerConfigError",
                "message": 'secret "digits-0b5e9f0c-tls-2-0123456789abcdef" not found',
            },
            "Ready",
            "SecretNotFound",
            'digits-worker-1: secret "digits-0b5e9f0c-tls-2-0123456789abcdef" not found; it was the certificate of this attempt and was '
            "deleted; set spec.suspend to true and back: the next attempt has a new one",
            id="a certificate that a user deleted",
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
        pytest.param(
            {"scheduled": True, "reason": "CreateContainerConfigError", "message": ELSEWHERE},
            "Ready",
            "VolumeInUse",
            f"digits-worker-1: {ELSEWHERE}; one node at a time may have it: use a claim with access mode ReadWriteMany, "
            "or keep all pods of the job on one node by nodeSelector",
            id="a volume of one node",
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
    scene = make_job().started().reports(0, last_update_time=None).seen()
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


def test_a_master_that_falls_silent_makes_the_progress_unknown_not_the_job_stalled():
    scene = make_job().training()
    for _ in range(12):
        scene.after(6).step()
    assert scene.says("Progressing") == ("Unknown", "NoReport")
    assert scene.status.state is JobState.TRAINING, "only the operator cannot reach it"
    scene.reports(300).seen()
    assert scene.says("Progressing") == ("True", "Training")


def test_an_operator_that_was_away_writes_nothing_about_jobs_that_run():
    scene = make_job().training().after(600).new_operator()
    before = scene.status
    assert scene.step().status == before
    scene.after(59).step()
    assert scene.status == before
    scene.reports(10).step()
    assert scene.status == before


def test_an_operator_that_cannot_say_since_when_it_listens_keeps_what_is_known():
    scene = make_job().training().after(600).new_operator()
    scene.listening_since = None
    before = scene.status
    assert scene.after(600).step().status == before


def test_an_operator_that_gets_no_report_for_a_minute_does_not_know_and_the_job_trains_on():
    scene = make_job().training().after(600).new_operator().after(61)
    scene.step()
    assert scene.says("Progressing") == ("Unknown", "NoReport")
    assert scene.says("Ready") == ("True", "AllPodsReady")
    assert scene.status.state is JobState.TRAINING


class TestReady:
    """Ready says that the peers found one another; of our own loop only the master knows that."""

    def test_not_before_the_first_report_of_the_attempt(self):
        scene = make_job().started()
        assert scene.says("Ready") == ("False", "WaitingForPeers")
        assert scene.condition("Ready").message == "Every pod runs; the master has not reported yet"
        scene.after(5).reports(0, last_update_time=None, waiting_for="worker-1 (3 s)").seen()
        assert scene.says("Ready") == ("False", "WaitingForPeers")
        scene.after(5).reports(0, last_update_time=None).seen()
        assert scene.says("Ready") == ("True", "AllPodsReady")
        assert scene.condition("Ready").last_transition_time == scene.now

    def test_a_restarted_job_recovers_with_the_first_report_of_its_new_attempt(self):
        scene = make_job().rules(default="RestartJob").training().failed(0).seen().after(1).seen().all_run().seen()
        assert scene.status.state is JobState.RESTARTING
        scene.reports(5).seen()
        assert scene.says("Restarting") == ("False", "Recovered")

    def test_a_replaced_worker_needs_no_new_report(self):
        scene = make_job().training().failed(0).seen().after(1).seen().all_run().seen()
        assert scene.says("Ready") == ("True", "AllPodsReady")

    def test_an_operator_that_cannot_read_the_master_does_not_wait_for_ever(self):
        scene = make_job().seen().after(300).all_run().seen().after(59.9).seen()
        assert scene.says("Ready")[0] == "False"
        scene.after(0.1).seen()
        assert scene.says("Ready") == ("True", "AllPodsReady")
        assert scene.says("Progressing") == ("Unknown", "NoReport")

    def test_a_new_operator_gives_the_master_its_time_too(self):
        scene = make_job().started().after(59).new_operator().after(10).seen()
        assert scene.says("Ready") == ("False", "WaitingForPeers")
        scene.after(50).seen()
        assert scene.says("Ready")[0] == "True"

    def test_a_new_operator_takes_the_readiness_that_it_finds(self):
        scene = make_job().training().new_operator().seen()
        assert scene.says("Ready")[0] == "True"
        scene.failed(0).seen().after(1).seen().all_run().seen()
        assert scene.says("Ready")[0] == "True", "the attempt had trained"

    @pytest.mark.parametrize("scene", [make_job().script(), make_job().command()], ids=["script", "command"])
    def test_a_program_of_the_user_is_ready_with_its_pods(self, scene):
        assert scene.started().says("Ready")[0] == "True"


def test_replica_counts():
    scene = make_job().workers(3).servers(1).training().failed(0).succeeded(1).seen()
    counts = {
        status.role: (status.desired, status.ready, status.succeeded, status.failed, status.restarts)
        for status in scene.status.replica_statuses
    }
    assert counts == {"Master": (1, 1, 0, 0, 0), "ParameterServer": (1, 1, 0, 0, 0), "Worker": (3, 1, 1, 1, 1)}
    assert scene.status.worker.ready_replicas == 1
    assert scene.status.worker.selector == "disttrain.dev/job-name=digits,disttrain.dev/role=worker"


class TestSidecar:
    """A container beside the trainer. Its trouble is said, and the trainer decides."""

    def crashing(self, scene, **fields):
        trouble = Trouble(container="ship", words="failed with exit code 3", **fields)
        return scene.change(1, trouble=trouble)

    def test_its_trouble_is_said_once_and_the_job_goes_on(self):
        scene = self.crashing(make_job().training())
        events = [event for step in range(11, 80) for event in scene.after(60).reports(step).step().events]
        assert [(event.reason, event.warning) for event in events] == [("SidecarFailing", True)]
        message = "Container ship of pod digits-worker-1: failed with exit code 3; log: kubectl logs -n team digits-worker-1 -c ship"
        assert events[0].message == message
        assert scene.says("Ready") == ("True", "AllPodsReady")
        assert scene.condition("Ready").message == message
        assert scene.status.state is JobState.TRAINING

    def test_what_is_over_is_not_said_any_more(self):
        scene = self.crashing(make_job().training(), until=NOON + timedelta(seconds=100)).seen()
        assert scene.condition("Ready").message
        assert scene.after(100).reports(20).seen().condition("Ready").message == ""

    def test_one_that_has_a_minute_to_become_ready_is_not_named_before(self):
        scene = self.crashing(make_job().training(), since=NOON + timedelta(seconds=60)).seen()
        assert scene.condition("Ready").message == ""
        assert "ship" in scene.after(60).reports(20).seen().condition("Ready").message

    def test_one_that_keeps_the_trainer_from_starting_is_named_where_the_job_waits_and_fails(self):
        scene = make_job().run_policy(startupDeadlineSeconds=600).seen().all_run()
        waits = {"reason": "CrashLoopBackOff", "message": "container ship: back-off 5m0s restarting failed container"}
        self.crashing(scene).change(1, phase=Phase.PENDING, ready=False, **waits).seen()
        assert scene.says("Ready") == ("False", "SidecarFailing")
        assert scene.condition("Ready").message.startswith("digits-worker-1: container ship: back-off 5m0s")
        scene.after(600).seen()
        assert "ship" in scene.condition("Failed").message


def test_a_pod_whose_trainer_has_ended_has_ended_a_minute_later_though_another_container_runs_on() -> None:
    """One that a webhook added. Until then the kubelet may still say that a disruption ended it."""
    ends = {"phase": Phase.RUNNING, "ready": False, "finished": NOON, "termination": Termination(done=True)}
    scene = make_job().training().change(0, exit_code=0, **ends).change(1, exit_code=0, **ends)
    assert not scene.after(59).reports(50).seen().finished
    assert scene.after(1).reports(50).seen().after(11).seen().status.is_true("Complete")
    assert scene.pods == {}, "what still runs at the end is deleted"
    scene = make_job().training().change(1, exit_code=137, **(ends | {"termination": Termination()}))
    assert scene.after(60).reports(10).seen().status.restarts.counted_towards_limit == 1


def test_what_pods_are_waited_for_is_said_as_it_is():
    scene = make_job()
    scene.step()
    assert scene.condition("Scheduled").message == "Creating the pods"
