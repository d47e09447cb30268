"""The environment of a training process: the torchrun variables, PET_* and DISTTRAIN_*. The same code for pods and for local processes.

Not here: what the agent in a worker sets for each of its processes (their LOCAL_RANK, TORCHELASTIC_*), and what a template adds.
"""

from disttrain.api import environment as env
from disttrain.api import trainer_status
from disttrain.api.environment import CRASHES, ExitCode
from disttrain.api.health import Health
from disttrain.api.job import DistTrainJob
from disttrain.api.names import CONTROL_PORT, RENDEZVOUS_PORT, SERVER_PORT, Role, pod_host
from disttrain.api.policies import Action, FailurePolicy
from disttrain.api.runtime import Addresses, JobConfig
from disttrain.api.trainer import Command, Loop, Script

NOTICE_SECONDS = 120
"""Within which the operator sees that a rule of spec.health is in breach, and the pods of an attempt that it ends have taken their last
checkpoint."""


def store_host(job: DistTrainJob) -> Role:
    """Whose first process hosts torch's store: of a command, which has no agent to announce the master's, the worker's."""
    return Role.WORKER if isinstance(job.spec.trainer.work, Command) else Role.MASTER


def keeping_workers(job: DistTrainJob) -> int:
    """Workers that keep copies of the data; 0 where the volume alone has it."""
    return job.spec.worker.most if job.spec.data is not None and job.spec.data.replication > 1 else 0


def cluster_addresses(job: DistTrainJob) -> Addresses:
    """Where the processes listen on a cluster: names of the job's Service."""
    name = job.metadata.name
    return Addresses(
        control=f"{pod_host(name, Role.MASTER, 0)}:{CONTROL_PORT}",
        rendezvous=f"{pod_host(name, store_host(job), 0)}:{RENDEZVOUS_PORT}",
        parameter_servers=tuple(
            f"{pod_host(name, Role.PARAMETER_SERVER, index)}:{SERVER_PORT}" for index in range(job.spec.servers)
        ),
        copies=tuple(f"{pod_host(name, Role.WORKER, index)}:{SERVER_PORT}" for index in range(keeping_workers(job))),
    )


def job_config(
    job: DistTrainJob, attempt: int, addresses: Addresses, *, workers_per_machine: int = 1, code_dir: str | None = None
) -> JobConfig:
    """The configuration of every process of an attempt. code_dir: where the workers have trainer.code."""
    trainer = job.spec.trainer
    parts = trainer.parts_per_step or job.status.parts_per_step
    # Named only where it is not the default, which a trainer of an earlier release has without the field.
    trainer = trainer.model_copy(update={"parts_per_step": parts if parts != job.spec.default_parts_per_step else None})
    if trainer.code is not None:
        # A script's file is named in full, and nothing else said of the code: a trainer of an earlier release, which the pods of a
        # running attempt keep, knows no trainer.code.
        place = f"{code_dir}/" if code_dir is not None else ""
        script = trainer.script
        if script is not None:
            trainer = trainer.model_copy(update={"script": script.model_copy(update={"file": f"{place}{script.file}"})})
        trainer = trainer.model_copy(update={"code": None})
    return JobConfig(
        namespace=job.metadata.namespace,
        name=job.metadata.name,
        uid=job.metadata.uid,
        attempt=attempt,
        strategy=job.spec.strategy,
        trainer=trainer,
        code_origin=job.spec.trainer.code.origin if job.spec.trainer.code is not None else None,
        data=job.spec.data,
        checkpoint=job.spec.checkpoint,
        workers=job.spec.worker.most,
        min_workers=job.spec.worker.elastic.min_replicas if job.spec.worker.elastic is not None else None,
        processes_per_worker=job.spec.processes_per_worker,
        workers_per_machine=workers_per_machine,
        gpus_per_worker=job.spec.worker.gpus_per_worker,
        parameter_servers=job.spec.servers,
        tls=job.spec.network.tls,
        addresses=addresses,
        exit_codes_of_rules=_exit_codes_of_rules(job.spec.failure_policy),
        roll_back_seconds=_roll_back_seconds(job.spec.health),
    )


def _roll_back_seconds(health: Health | None) -> int | None:
    longest = health.roll_back_seconds if health is not None else None
    return None if longest is None else longest + NOTICE_SECONDS


def _exit_codes_of_rules(policy: FailurePolicy) -> tuple[int, ...]:
    """Of the exit codes after which a process can be restarted in place, those that the failure policy decides about."""
    named = {code for rule in policy.rules for code in rule.on_exit_codes or ()}
    if policy.default_action is not Action.RESTART_REPLICA:
        named |= CRASHES  # the default action is never taken for a process that lost its peers
    return tuple(sorted(named & (CRASHES | {ExitCode.PEER_LOST})))


def training_environment(
    job: DistTrainJob,
    role: Role,
    index: int,
    attempt: int,
    addresses: Addresses,
    *,
    metrics_port: int,
    termination_log: str,
    checkpoint_dir: str | None = None,
    data_dir: str | None = None,
    data_key: str | None = None,
    data_url_options: str | None = None,
    copies_dir: str | None = None,
    code_dir: str | None = None,
    tls_dir: str | None = None,
    workers_per_machine: int = 1,
) -> dict[str, str]:
    """The variables of one process that no template may replace. Ranks are those of the pod's first process; only workers have them.

    A command gets no LOCAL_*: Lightning would conclude that its processes are started for it, and wait for them without end.
    """
    config = job_config(job, attempt, addresses, workers_per_machine=workers_per_machine, code_dir=code_dir)
    host, _, port = addresses.rendezvous.rpartition(":")
    variables = {
        env.MASTER_ADDR: host,
        env.MASTER_PORT: port,
        env.WORLD_SIZE: str(job.spec.world_size),
        env.JOB: config.encode(),
        env.ROLE: role.value,
        env.INDEX: str(index),
        env.ATTEMPT: str(attempt),
        env.METRICS_PORT: str(metrics_port),
        env.TERMINATION_LOG: termination_log,
    }
    if role is Role.WORKER:
        if code_dir is not None:
            variables[env.CODE_DIR] = code_dir
        if data_key is not None:
            variables[env.DATA_KEY] = data_key
        if data_url_options is not None:
            variables[env.DATA_URL_OPTIONS] = data_url_options
        if copies_dir is not None:
            variables[env.COPIES_DIR] = copies_dir
        rank = index * config.processes_per_worker
        variables[env.RANK] = str(rank)
        if isinstance(job.spec.trainer.work, Command):
            variables[env.GROUP_RANK] = str(index)
        else:
            variables[env.LOCAL_RANK] = str(config.local_rank(rank))
            variables[env.LOCAL_WORLD_SIZE] = str(config.local_world_size)
            variables[env.GROUP_RANK] = str(config.group_rank(index))
    variables |= of_earlier_attempts(job, role)
    if checkpoint_dir is not None:
        variables[env.CHECKPOINT_DIR] = checkpoint_dir
    if data_dir is not None:
        variables[env.DATA_DIR] = data_dir
    if tls_dir is not None:
        variables[env.TLS_DIR] = tls_dir
    return variables


def of_earlier_attempts(job: DistTrainJob, role: Role) -> dict[str, str]:
    """The variables with which a process learns the checkpoints that are not taken any more, and the master the step that the job had
    reached before it."""
    variables = {}
    training, roll_back = job.status.training, job.status.roll_back
    if role is Role.MASTER and training is not None and training.step:
        variables[env.STEPS_DONE] = str(training.step)
    if roll_back is not None:
        variables[env.ROLL_BACK] = f"{roll_back.attempt}:{roll_back.step}"
    return variables


def reports_status(job: DistTrainJob, role: Role) -> bool:
    """Whether a process may report as programs do that know Kubeflow's Trainer."""
    return role is Role.WORKER and isinstance(job.spec.trainer.work, Script | Command)


def default_environment(
    job: DistTrainJob, role: Role, index: int, addresses: Addresses, *, master_metrics: str, status_token: str
) -> dict[str, str]:
    """The variables of one process that a template may replace.

    master_metrics: host:port of the master's metrics. status_token: the file with the token for reports there.
    """
    variables = {env.UNBUFFERED: "1"}
    if role is not Role.WORKER:
        return variables
    if reports_status(job, role):
        # transformers' Trainer reports there by itself. Its token is read from the file.
        variables[trainer_status.SERVER_URL] = f"http://{master_metrics}{trainer_status.PATH}"
        variables[trainer_status.SERVER_TOKEN] = status_token
    match job.spec.trainer.work:
        case Loop():
            # All workers of our own loop iterate over a set of strings in the same order. A vocabulary that a dataset numbers so would
            # otherwise be a different one in each worker, and the training would silently be useless.
            variables[env.HASH_SEED] = str(job.spec.trainer.seed)
        case Command():
            host, _, port = addresses.rendezvous.rpartition(":")
            # A bare `torchrun train.py` takes its options from these. Without them each pod would train a model of its own.
            variables |= {
                env.PET_NNODES: str(job.spec.worker.replicas),
                env.PET_NPROC_PER_NODE: str(job.spec.worker.processes),
                env.PET_NODE_RANK: str(index),
                env.PET_MASTER_ADDR: host,
                env.PET_MASTER_PORT: port,
            }
    return variables
