"""spec.trainer: what is trained. Not here: where it runs (spec.py)."""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Annotated, TypeAlias

from pydantic import Field, StrictBool, StrictInt, StringConstraints
from pydantic.alias_generators import to_camel

from disttrain.api import schedule
from disttrain.api.base import Model, Rule
from disttrain.api.code import ESCAPES, Code, escapes
from disttrain.api.course import TRAINER_RULES, EarlyStopping, NanPolicy
from disttrain.api.optimizer import Optimizer
from disttrain.api.output_progress import OutputProgress
from disttrain.api.precision import Precision
from disttrain.api.types import (
    INT32_MAX,
    Argument,
    DnsSubdomain,
    Factory,
    FreeForm,
    PositiveNumber,
)

_FACTORIES = ("model", "dataset", "loss", "evaluate", "collate", "parallelize", "pipeline_split", "hooks")
"""The fields that name a callable of the user's, package.module:callable; and optimizer.factory."""
_MAX_ARGUMENTS = 65_536
"""Characters of all arguments together: they travel in one variable of the environment, which holds 128 KiB."""


class Backend(StrEnum):
    AUTO = "Auto"
    """nccl where every worker has a GPU, gloo elsewhere."""
    GLOO = "gloo"
    NCCL = "nccl"


class LastBatch(StrEnum):
    """What becomes of the samples of an epoch that fill no whole batch."""

    KEEP = "Keep"
    """They are the last batch, a smaller one. A single sample joins the batch before it instead."""
    DROP = "Drop"
    """They are left out of this epoch; each epoch leaves others out."""
    SPREAD = "Spread"
    """They go into the last full batches, as evenly as possible."""


class Script(Model):
    """The user's own file, run under torchrun's env:// contract."""

    RULES = (
        Rule(
            # Of earlier releases: jobs that have it are stored (stored.py), and the API server tolerates what an update leaves as it is.
            cel="!has(self.configMap)",
            check=lambda s: s.config_map is None,
            message="write trainer.code.configMap",
            field="configMap",
            shows="configMap",
        ),
    )
    config_map: DnsSubdomain | None = None
    """Not any more: write trainer.code.configMap."""
    file: Annotated[str, StringConstraints(pattern=r"^[-._/a-zA-Z0-9]+\.py$", max_length=1024)]
    """The Python file: one of trainer.code, or without that a path in the image or from the current folder on."""
    args: Annotated[tuple[Argument, ...], Field(max_length=256)] = ()
    """Arguments of the script. Default: none."""


@dataclass(frozen=True, slots=True)
class Command:
    """Any program, without our trainer in it."""

    words: tuple[str, ...]
    """The program and its arguments."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Our own loop: the user's callables that it calls, each package.module:callable, and its optimiser."""

    model: str
    dataset: str
    optimizer: Optimizer
    loss: str | None
    evaluate: str | None
    collate: str | None
    parallelize: str | None
    pipeline_split: str | None


@dataclass(frozen=True, slots=True)
class ScriptLoop(Loop):
    """A script's own loop on parameter servers: our loop in everything but that the script has model, data and loss."""

    script: Script


Work: TypeAlias = Loop | Script | Command
"""What the workers run."""


_OURS = "has(self.model) || (has(self.script) && has(self.optimizer))"
"""Where the servers or our loop have the optimizer, and the master assigns the parts."""


class Trainer(Model):
    """What is trained: exactly one of model with dataset (our loop), script, or command."""

    RULES = (
        *TRAINER_RULES,
        Rule(
            cel="[has(self.model), has(self.script), has(self.command)].filter(x, x).size() == 1",
            check=lambda t: sum(x is not None for x in (t.model, t.script, t.command)) == 1,
            message="set exactly one of model (with dataset), script and command",
        ),
        Rule(
            cel="!has(self.command) || self.command.size() == 0 || self.command[0] != ''",
            check=lambda t: not t.command or t.command[0] != "",
            message="begins with the program, such as [python, -m, mine]",
            field="command",
        ),
        Rule(
            cel=f"!has(self.command) || self.command.map(a, a.size()).sum() <= {_MAX_ARGUMENTS}",
            check=lambda t: t.command is None or sum(map(len, t.command)) <= _MAX_ARGUMENTS,
            message=f"must have at most {_MAX_ARGUMENTS} characters in all; put the rest into a file",
            field="command",
        ),
        Rule(
            cel=f"!has(self.script) || self.script.args.map(a, a.size()).sum() <= {_MAX_ARGUMENTS}",
            check=lambda t: t.script is None or sum(map(len, t.script.args)) <= _MAX_ARGUMENTS,
            message=f"must have at most {_MAX_ARGUMENTS} characters in all; put the rest into a file",
            field="script.args",
        ),
        Rule(
            cel="!has(self.code) || !has(self.code.configMap) || !has(self.script) || !self.script.file.contains('/')",
            check=lambda t: t.code is None or t.code.config_map is None or t.script is None or "/" not in t.script.file,
            message="with code.configMap it is one of its keys, which have no /",
            field="script.file",
            shows="script.file",
        ),
        Rule(
            cel=f"!has(self.code) || !has(self.script) || !self.script.file.matches('{ESCAPES}')",
            check=lambda t: t.code is None or t.script is None or not escapes(t.script.file),
            message="with code it is one of its files: a relative path without '..'",
            field="script.file",
            shows="script.file",
        ),
        Rule(
            cel="has(self.model) == has(self.dataset)",
            check=lambda t: (t.model is None) == (t.dataset is None),
            message="model and dataset belong together: package.module:factory each",
            field="dataset",
            shows="dataset",
        ),
        Rule(
            cel=f"!({_OURS}) || has(self.epochs) != has(self.maxSteps)",
            check=lambda t: not t.is_ours or (t.epochs is None) != (t.max_steps is None),
            message="with a model, or a script with an optimizer, set exactly one of epochs and maxSteps",
            field="epochs",
            shows="epochs",
        ),
        Rule(
            cel="!has(self.model) || has(self.optimizer)",
            check=lambda t: t.model is None or t.optimizer is not None,
            message="with a model set the optimizer, such as {name: SGD, learningRate: 0.1}",
            field="optimizer",
        ),
        Rule(
            cel="!has(self.partsPerStep) || self.batchSize < 1 || self.batchSize >= self.partsPerStep",
            check=lambda t: t.parts_per_step is None or t.batch_size >= t.parts_per_step,
            message="must be at most batchSize: each part has at least one sample",
            field="partsPerStep",
            shows="partsPerStep",
        ),
        Rule(
            cel="has(self.model) || (!has(self.loss) && !has(self.evaluate) && !has(self.collate) "
            "&& !has(self.parallelize) && !has(self.pipelineSplit) && !self.activationCheckpointing && !self.compile "
            "&& self.precision == 'Float32')",
            check=lambda t: (
                t.model is not None
                or (
                    not (t.loss or t.evaluate or t.collate or t.parallelize or t.pipeline_split)
                    and not (t.activation_checkpointing or t.compile or t.precision is not Precision.FLOAT32)
                )
            ),
            message="loss, evaluate, collate, parallelize, pipelineSplit, activationCheckpointing, compile and precision are for our loop "
            "(model and dataset); a script or command brings its own",
        ),
        Rule(
            cel=f"!has(self.progress) || !({_OURS})",
            check=lambda t: t.progress is None or not t.is_ours,
            message="is read from the output of a script or command; our loop and parameter servers count their steps: leave it out",
            field="progress",
        ),
        Rule(
            cel="has(self.model) || self.gradientAccumulationSteps == 1",
            check=lambda t: t.model is not None or t.gradient_accumulation_steps == 1,
            message="is for our loop (model and dataset); a script has ps.no_sync()",
            field="gradientAccumulationSteps",
            shows="gradientAccumulationSteps",
        ),
        Rule(
            cel=f"{_OURS} || (!has(self.optimizer) && !has(self.epochs) && !has(self.maxSteps) && !has(self.partsPerStep) "
            "&& !has(self.maxGradientNorm) && self.lastBatch == 'Keep')",
            check=lambda t: (
                t.is_ours
                or (
                    not (t.optimizer or t.epochs or t.max_steps or t.parts_per_step or t.max_gradient_norm)
                    and t.last_batch is LastBatch.KEEP
                )
            ),
            message="optimizer, epochs, maxSteps, partsPerStep, maxGradientNorm and lastBatch are for our loop (model and dataset), and "
            "for a script with strategy.type ParameterServer, which needs the optimizer; any other script or command brings its own",
        ),
        Rule(
            cel=f"{_OURS} || self.loaderWorkers == 0",
            check=lambda t: t.is_ours or t.loader_workers == 0,
            message="is for our loop (model and dataset), and for a script with strategy.type ParameterServer; any other script or command "
            "brings its own loader",
            field="loaderWorkers",
            shows="loaderWorkers",
        ),
        *schedule.rules(ours=f"({_OURS})"),
    )
    model: Factory | None = None
    """package.module:factory(config) -> torch.nn.Module."""
    dataset: Factory | None = None
    """package.module:factory(config, split) -> a map-style dataset (DataParallel: or an iterable one); split is "train" or "test"."""
    loss: Factory | None = None
    """package.module:function(model, batch) -> the mean loss of the batch, or (mean, weight), where the mean is one over tokens,
    pixels or a mask, whose number is the weight. Without a weight it is read from the loss's graph where that shows it (cross entropy,
    sum / count), else it is the number of samples. Last may come {name: number}, means of the same weight to be reported.
    Default: cross entropy of (input, target)."""
    evaluate: Factory | None = None
    """package.module:function(model, dataset) -> a few named numbers, on split "test" at the end. A number may be (mean, weight), the
    weight being what it is the mean of, such as samples: then the ranks of DataParallel share the data set. Default: none."""
    evaluate_every_steps: Annotated[StrictInt, Field(ge=0, le=INT32_MAX)] = 0
    """Steps between two evaluations, beside the one at the end. With parameter servers one worker evaluates while the others train; Async
    and BoundedStaleness: the parameters of that step or newer ones. Default: 0, only at the end."""
    early_stopping: EarlyStopping | None = None
    """The job is complete when a number of the evaluation no longer gets better. Default: never."""
    nan_policy: NanPolicy | None = None
    """What a loss that is NaN or infinite does. Default: the job fails."""
    hooks: Factory | None = None
    """package.module:Class, of which each worker makes one object; methods, each optional: on_start(task), on_step(step, loss, metrics),
    on_evaluate(metrics) -> whether to stop. Default: none."""
    optimizer: Optimizer | None = None
    """The optimiser of our loop; with a script and strategy.type ParameterServer, that of the servers."""
    learning_rate_schedule: schedule.LearningRateSchedule | None = None
    """Multiplies the learning rate of a step, with s steps before it of T in all, W warmupSteps, p = (s - W) / (T - W) and m minimumFactor:
    below W by (s + 1) / (W + 1), then Constant: 1, Linear: 1 - (1 - m) p, Cosine: m + (1 - m) (1 + cos(pi p)) / 2,
    Step: gamma^floor((s - W) / stepSize). Default: 1."""
    config: FreeForm | None = None
    """Handed to the factories as it is, some 100 KiB at most. Default: {}."""
    epochs: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    """Passes over the training data. Exactly one of epochs and maxSteps."""
    max_steps: Annotated[StrictInt, Field(ge=1, le=INT32_MAX)] | None = None
    """Steps of the global batch. Exactly one of epochs and maxSteps."""
    batch_size: Annotated[StrictInt, Field(ge=1, le=16_777_216)] = 64
    """Samples of one step over all workers together. Default: 64."""
    last_batch: LastBatch = LastBatch.KEEP
    """What becomes of the samples of an epoch that fill no whole batch: Keep (a smaller last batch; a single sample joins the batch
    before it), Drop (left out of this epoch), or Spread (into the last full batches). Default: Keep."""
    parts_per_step: Annotated[StrictInt, Field(ge=1, le=65_536)] | None = None
    """Parts of a global batch, each computed by one worker process: more or fewer processes compute the same parts. Fixed for the job's
    life. Default: the worker processes of the job when it is created."""
    max_gradient_norm: PositiveNumber | None = None
    """A gradient of a larger L2 norm, over all parameters, is scaled down to this one, as by torch's clip_grad_norm_: that of a step, under
    Async and BoundedStaleness that of a part, with localSteps that of each worker's own step. Default: no clipping."""
    gradient_accumulation_steps: Annotated[StrictInt, Field(ge=1, le=65_536)] = 1
    """Portions of each part of a step, computed one after the other, whose gradients add up: only one portion's activations are in
    memory. Default: 1."""
    collate: Factory | None = None
    """package.module:function(samples) -> batch, for samples that do not stack, such as sequences of different length; samples is a
    list. Default: torch's default_collate."""
    loader_workers: Annotated[StrictInt, Field(ge=0, le=128)] = 0
    """Processes of each worker process that load the batches of its next parts while it computes: dataset[i] and collate run there.
    Default: 0, the process that computes loads them."""
    parallelize: Factory | None = None
    """package.module:function(model, mesh, config) -> model, cut by torch's parallelize_module and fully_shard; mesh has the dimensions
    pipeline, replicate, shard and tensor. Only where the strategy cuts the model. Default: what is certain of it is cut."""
    pipeline_split: Factory | None = None
    """package.module:function(model, stages, config) -> the list of its stages, modules that are called one after the other. Only with
    modelParallel.pipeline above 1. Default: pipeline_stages() of the model, or an nn.Sequential, cut by number of parameters."""
    precision: Precision = Precision.FLOAT32
    """BFloat16: forward and loss run under torch.autocast; parameters, gradients and optimizer stay float32. Default: Float32."""
    activation_checkpointing: StrictBool = False
    """Backward computes the blocks of the model again, so that forward keeps only what goes into each: less memory, a third more time.
    Blocks are the members of the largest ModuleList or Sequential. The result is the same. Default: false."""
    compile: StrictBool = False
    """The blocks of the model run as torch.compile makes them; needs a C++ compiler in the image, else the log says so and they run as they
    are. Default: false."""
    seed: Annotated[StrictInt, Field(ge=0, le=INT32_MAX)] = 0
    """Seed of the model's first parameters and of the data's order. Default: 0."""
    deterministic: StrictBool = False
    """Bit for bit the same result on every run, also through a resume: with as many workers, or with parameter servers with any number of
    them; costs some speed. Default: false."""
    find_unused_parameters: StrictBool = False
    """DataParallel: look in each step for parameters that take no part in the loss, so that the gradients of the others are sent while
    backward still runs. Parameters may take no part either way. Default: false."""
    backend: Backend = Backend.AUTO
    """Auto, gloo or nccl. Default: Auto."""
    script: Script | None = None
    """The user's own file under torchrun's environment. With strategy.type ParameterServer it trains by
    disttrain_trainer.session.parameter_server, and optimizer, epochs or maxSteps, and batchSize are set here."""
    code: Code | None = None
    """Modules for factories, script and command that the image does not hold: a ConfigMap's, or those on a claim. Read-only in the workers,
    at /disttrain/code. The workers of an attempt have the same code: one whose code differs is refused. Default: none."""
    command: Annotated[tuple[Argument, ...], Field(min_length=1, max_length=256)] | None = None
    """Any program, started once in each worker. RANK and WORLD_SIZE count the workers, MASTER_ADDR is worker 0, and PET_* gives torchrun
    its options."""
    progress: OutputProgress | None = None
    """Script and command: their progress is read from what they print. With a command the image needs our trainer, and sh. Default: a
    program reports by disttrain_trainer.session, or not at all."""

    def factories(self) -> list[tuple[tuple[str, ...], str]]:
        """The path from here of each field that names a callable of the user's, and the name."""
        named: list[tuple[tuple[str, ...], str | None]] = [
            ((to_camel(name),), getattr(self, name)) for name in _FACTORIES
        ]
        named.append((("optimizer", "factory"), self.optimizer.factory if self.optimizer is not None else None))
        return [(path, name) for path, name in named if name is not None]

    @property
    def is_ours(self) -> bool:
        """Whether the master assigns the parts: our loop, and a script on parameter servers."""
        return self.model is not None or (self.script is not None and self.optimizer is not None)

    @cached_property
    def work(self) -> Work:
        """What the workers run: the one kind of work that the fields describe (`RULES`)."""
        match self:
            case Trainer(command=tuple(words)):
                return Command(words)
            case Trainer(script=Script() as script, optimizer=Optimizer() as optimizer):
                return ScriptLoop("", "", optimizer, None, None, None, None, None, script=script)
            case Trainer(script=Script() as script):
                return script
            case Trainer(model=str(model), dataset=str(dataset), optimizer=Optimizer() as optimizer):
                return Loop(
                    model,
                    dataset,
                    optimizer,
                    loss=self.loss,
                    evaluate=self.evaluate,
                    collate=self.collate,
                    parallelize=self.parallelize,
                    pipeline_split=self.pipeline_split,
                )
        raise ValueError("trainer names no work")

    @property
    def loop(self) -> Loop:
        """The work, for what only a process of our loop runs. Raises TypeError for a script or a command."""
        if not isinstance(work := self.work, Loop):
            raise TypeError(f"this job runs a {type(work).__name__}, not our loop")
        return work
