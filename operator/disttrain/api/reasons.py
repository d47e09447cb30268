"""Condition types, reasons, states: the words with which a job says how it is. One constant, one meaning."""

from enum import StrEnum


class JobState(StrEnum):
    """status.state: one word derived from the conditions, for the printer column."""

    PENDING = "Pending"
    SCHEDULING = "Scheduling"
    STARTING = "Starting"
    TRAINING = "Training"
    STALLED = "Stalled"
    RESTARTING = "Restarting"
    RESIZING = "Resizing"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class ConditionType(StrEnum):
    """The types of status.conditions."""

    VALID = "Valid"
    """The job can be run as it is written."""
    SUSPENDED = "Suspended"
    """Every pod is freed; spec.suspend says so."""
    SCHEDULED = "Scheduled"
    """Every pod has a node."""
    READY = "Ready"
    """Every pod runs and the peers found one another."""
    PROGRESSING = "Progressing"
    """Steps are being made."""
    RESTARTING = "Restarting"
    """Something failed and is being replaced."""
    COMPLETE = "Complete"
    """Final: the job reached its end. Never true together with Failed."""
    FAILED = "Failed"
    """Final: the job will not be tried again."""


class Reason(StrEnum):
    """The reasons of conditions and Events; the message beside it names the pod and what to do."""

    ACCEPTED = "Accepted"
    NOT_YET_SUPPORTED = "NotYetSupported"
    INVALID_SPEC = "InvalidSpec"
    TEMPLATE_NOT_ALLOWED = "TemplateNotAllowed"
    """A template asks for its pod's node, and the operator may not grant that."""
    POD_REFUSED = "PodRefused"
    """The API server refused a pod of the job: its message says why (quota, Pod Security, a missing account)."""
    SECRET_NOT_FOUND = "SecretNotFound"
    CONFIG_MAP_NOT_FOUND = "ConfigMapNotFound"
    CLAIM_NOT_FOUND = "PersistentVolumeClaimNotFound"

    GANG_SCHEDULER_NOT_FOUND = "GangSchedulerNotFound"
    """The cluster has no PodGroups of the scheduler that scheduling.gang names."""

    NAME_TAKEN = "NameTaken"
    """An object of another owner holds a name that the job needs."""

    FORMER_JOB = "FormerJobEnds"
    """Objects of a deleted job of the same name still hold names that the job needs."""

    SUSPENDED = "Suspended"
    SUSPENDING = "Suspending"
    """The pods were asked to end and are not all gone."""
    RESUMED = "Resumed"
    NOT_SUSPENDED = "NotSuspended"

    ALL_PODS_SCHEDULED = "AllPodsScheduled"
    WAITING_FOR_GANG = "WaitingForGang"
    GANG_TIMED_OUT = "GangTimedOut"
    """Not all pods of the gang found a node in time: all were deleted, and are created again after a pause."""
    UNSCHEDULABLE = "Unschedulable"
    SCHEDULING = "Scheduling"

    ALL_PODS_READY = "AllPodsReady"
    IMAGE_PULL = "ImagePull"
    CONTAINER_CONFIG = "ContainerConfig"
    """A container cannot be made: a Secret, ConfigMap or key that it names is missing."""
    VOLUME_IN_USE = "VolumeInUse"
    """Another node has a volume that one node at a time may have."""
    STARTING = "Starting"
    SIDECAR_FAILING = "SidecarFailing"
    """A container beside the trainer fails. Only where the trainer waits for it does the job wait, too."""
    WAITING_FOR_PEERS = "WaitingForPeers"

    TRAINING = "Training"
    STALLED = "Stalled"
    NO_STEP = "NoStep"
    """Every pod runs, and no step was seen for some time."""
    NO_REPORT = "NoReport"
    """The operator cannot reach the master; training may still be running."""

    REPLICA_FAILED = "ReplicaFailed"
    RESTARTED_IN_PLACE = "RestartedInPlace"
    """A process ended, and was started again in its pod."""
    EXITED_EARLY = "ExitedEarly"
    """A process of ours ended with exit code 0, and the job was not done."""
    MASTER_SILENT = "MasterSilent"
    """The master runs, but neither its peers nor the operator can reach it."""
    PREEMPTED = "Preempted"
    EVICTED = "Evicted"
    """A pod was evicted: its node is drained or shut down, or ran out of memory or storage."""
    NODE_LOST = "NodeLost"
    """The node of a pod does not report any more, or is gone."""
    NOT_READY = "PodNotReady"
    """A pod that was ready runs and is not ready any more."""
    RECOVERED = "Recovered"
    NO_FAILURE = "NoFailure"

    IN_PROGRESS = "InProgress"
    WORKERS_SUCCEEDED = "WorkersSucceeded"
    TRAINING_DONE = "TrainingDone"

    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    STARTUP_DEADLINE_EXCEEDED = "StartupDeadlineExceeded"
    RECOVERY_DEADLINE_EXCEEDED = "RecoveryDeadlineExceeded"
    FAILURE_POLICY = "FailurePolicy"
    USER_CODE = "UserCodeFailed"
    """A rule of the failure policy ended the job because the user's code raised."""
    NAN_LOSS = "NaNLoss"
    HEALTH_RULE = "HealthRule"
    """A rule of spec.health was in breach for its forSeconds; the message names it."""

    RESIZING = "Resizing"
    """An elastic job gets another number of workers."""
    CREATED = "Created"
    REPLACED = "Replaced"
    """A child of the job was deleted; it was made again."""


FINAL = frozenset({JobState.COMPLETE, JobState.FAILED})
