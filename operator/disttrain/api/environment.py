"""The environment of a training process and the exit codes it answers with."""

from enum import IntEnum
from typing import Final

from disttrain.api import trainer_status

PREFIX: Final = "DISTTRAIN_"
"""Every name that begins so is ours, also those of later versions."""
JOB: Final = "DISTTRAIN_JOB"
"""The process's configuration, a `disttrain.api.runtime.JobConfig` as JSON."""
ROLE: Final = "DISTTRAIN_ROLE"
INDEX: Final = "DISTTRAIN_INDEX"
"""The index of the pod within its role."""
ATTEMPT: Final = "DISTTRAIN_ATTEMPT"
STEPS_DONE: Final = "DISTTRAIN_STEPS_DONE"
"""The master's: the step that the job had reached before it. What a new attempt computes up to there, it computes again."""
ROLL_BACK: Final = "DISTTRAIN_ROLL_BACK"
"""Checkpoints that are not taken any more, such as 3:120: those of later steps than 120 that attempts before 3 wrote."""
CHECKPOINT_DIR: Final = "DISTTRAIN_CHECKPOINT_DIR"
MODEL_DIR: Final = "DISTTRAIN_MODEL_DIR"
"""Where the trained model is put at the end. Default: CHECKPOINT_DIR. Set in local runs, which always keep it."""
DATA_DIR: Final = "DISTTRAIN_DATA_DIR"
DATA_KEY: Final = "DISTTRAIN_DATA_KEY"
"""A worker's: the file with the key of data.encryption."""
DATA_URL_OPTIONS: Final = "DISTTRAIN_DATA_URL_OPTIONS"
"""A worker's: what data.urlSecretName names: a folder with a file for each entry, or a file with a JSON object."""
COPIES_DIR: Final = "DISTTRAIN_COPIES_DIR"
"""A worker's: the folder on its own disk for its copies of the data, with data.replication."""
COPIES_LIMIT: Final = "DISTTRAIN_COPIES_LIMIT"
"""A worker's: bytes that its container may take of the disk of its node: more, and the kubelet evicts the pod. Not in local runs."""
CODE_DIR: Final = "DISTTRAIN_CODE_DIR"
"""A worker's: the folder of trainer.code. The trainer puts it on the module path, once it has checked what is in there."""
TLS_DIR: Final = "DISTTRAIN_TLS_DIR"
"""The folder of the attempt's certificate, where network.tls is Mutual: ca.crt, tls.crt, tls.key."""
METRICS_PORT: Final = "DISTTRAIN_METRICS_PORT"
TERMINATION_LOG: Final = "DISTTRAIN_TERMINATION_LOG"
LOG_FORMAT: Final = "DISTTRAIN_LOG_FORMAT"
"""How the trainer logs: text, the default, or json. It and PROFILE are the only variables of PREFIX that a pod template may set."""
PROFILE: Final = "DISTTRAIN_PROFILE"
"""Steps of which each worker of our loop writes a trace, such as 10:15 for the steps 10 to 14."""
POD_UID: Final = "DISTTRAIN_POD_UID"
"""The uid of the pod, or of the replica of a local run: the plan counts the restarts in place of each. In a local run it also finds all
that the replica started."""
PARENT_PID: Final = "DISTTRAIN_PARENT_PID"
"""Local runs only: the process ends when this parent does, a SIGKILL of the parent included."""

HASH_SEED: Final = "PYTHONHASHSEED"
"""Python's own: the order of a set of strings. Read once, when Python starts."""

MASTER_ADDR: Final = "MASTER_ADDR"
MASTER_PORT: Final = "MASTER_PORT"
RANK: Final = "RANK"
WORLD_SIZE: Final = "WORLD_SIZE"
LOCAL_RANK: Final = "LOCAL_RANK"
LOCAL_WORLD_SIZE: Final = "LOCAL_WORLD_SIZE"
GROUP_RANK: Final = "GROUP_RANK"
GROUP_WORLD_SIZE: Final = "GROUP_WORLD_SIZE"
ROLE_NAME: Final = "ROLE_NAME"
ROLE_RANK: Final = "ROLE_RANK"
ROLE_WORLD_SIZE: Final = "ROLE_WORLD_SIZE"
MAX_RESTARTS: Final = "TORCHELASTIC_MAX_RESTARTS"
ELASTIC_RUN_ID: Final = "TORCHELASTIC_RUN_ID"
USE_AGENT_STORE: Final = "TORCHELASTIC_USE_AGENT_STORE"
"""Tells torch's env:// rendezvous that another process hosts the store, as torchrun's agent does."""
RESTART_COUNT: Final = "TORCHELASTIC_RESTART_COUNT"
"""How often the programs were started again in this attempt, from 0 as torchrun counts. Each round also has a store of its own,
because torch 2.15 no longer prefixes the keys with this number."""

PET_NNODES: Final = "PET_NNODES"
PET_NPROC_PER_NODE: Final = "PET_NPROC_PER_NODE"
PET_NODE_RANK: Final = "PET_NODE_RANK"
PET_MASTER_ADDR: Final = "PET_MASTER_ADDR"
PET_MASTER_PORT: Final = "PET_MASTER_PORT"
"""torchrun takes the default of each of its options from PET_<OPTION>. A command gets these five; a template may replace them."""

UNBUFFERED: Final = "PYTHONUNBUFFERED"
"""Python writes each line at once: the last lines of a program that is killed are in its log."""

RESERVED: Final = frozenset(
    {
        JOB,
        ROLE,
        INDEX,
        ATTEMPT,
        STEPS_DONE,
        ROLL_BACK,
        CHECKPOINT_DIR,
        MODEL_DIR,
        DATA_DIR,
        DATA_KEY,
        DATA_URL_OPTIONS,
        COPIES_DIR,
        COPIES_LIMIT,
        CODE_DIR,
        TLS_DIR,
        METRICS_PORT,
        TERMINATION_LOG,
        POD_UID,
        PARENT_PID,
    }
    | {MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK}
    | {GROUP_WORLD_SIZE, ROLE_NAME, ROLE_RANK, ROLE_WORLD_SIZE}
    | {USE_AGENT_STORE, RESTART_COUNT, MAX_RESTARTS, ELASTIC_RUN_ID}
)
"""What a pod template may not set, beside all of `PREFIX`: the operator does."""

_LAUNCHERS: Final = (
    trainer_status.PREFIX,
    "PET_",
    "TORCHELASTIC_",
    "SLURM_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MV2_COMM_",
    "JSM_NAMESPACE_",
)
"""Prefixes of the variables by which launchers tell a process its rank, or where to report: Kubeflow's Trainer, torchrun,
Slurm, Open MPI, MPICH, PMIx, MVAPICH, LSF."""
_LAUNCHED: Final = frozenset(
    {"NODE_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "TF_CONFIG", "JOB_COMPLETION_INDEX"}
)
"""The same of Lightning, Horovod, TensorFlow and Kubernetes' Jobs."""


def is_of_another_training(name: str) -> bool:
    """Whether a variable tells a process its place in a training. A process of a job must not inherit it from the shell of a local run:
    no pod has it, and a program would believe it."""
    return name in RESERVED or name in _LAUNCHED or name.startswith((PREFIX, *_LAUNCHERS))


STACKS_SIGNAL: Final = 39
"""A training process that gets it writes the stacks of its threads to its log: SIGRTMIN + 5, which no library is known to use."""


class ExitCode(IntEnum):
    """How a training process ends. 128 + n: ended by signal n."""

    DONE = 0
    USER_ERROR = 1
    """The user's code raised; the termination message has the exception's last line."""
    WRONG_INPUT = 2
    """Something that the job names is missing or wrong: a module, a factory, a file."""
    PEER_LOST = 75
    """A peer was lost or a wait ran out (EX_TEMPFAIL). Never the root cause: it counts only when it comes again without a step between."""


CRASHES: Final = frozenset(range(129, 256))
"""Exit codes of a process that ended by a signal, or by abort(): 128 + its number."""
