"""The worker of parameter servers whose training loop is the user's script: what session.parameter_server, batches and checkpoint do.

Rounds, parts, checkpoints and the end are those of our own loop's worker, and run in a thread beside the script's, so that a lost server or
master does not show in the script. Where our loop computes a loss, `Turns` hands the batch over, and waits until the script has called
`step()`. So one of the two threads runs at a time.
"""

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disttrain.api.names import MODEL_FILE
from disttrain.api.trainer import ScriptLoop
from disttrain_trainer.checkpoint import store, tensor_file
from disttrain_trainer.checkpoint.script_state import StateOfScript, read_state
from disttrain_trainer.data import loading
from disttrain_trainer.data.loader import fetcher, fingerprint_of
from disttrain_trainer.data.schedule import BatchPart, DataSet, Schedule
from disttrain_trainer.errors import OwnGroup, ProgramFailed, UserError, WrongInput
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.loop.trained import Trained
from disttrain_trainer.model import parameter_groups, user_code
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model.factories import add_current_folder
from disttrain_trainer.model.learning_rate import LearningRate
from disttrain_trainer.model.module import prepare
from disttrain_trainer.model.named_values import Values
from disttrain_trainer.model.objective import cross_entropy
from disttrain_trainer.model.task import Task
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import ParameterServerMember, Round
from disttrain_trainer.runtime import logs, script_runner
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.user_files import make_importable
from disttrain_trainer.strategies.parameter_server import Worker
from disttrain_trainer.strategies.script import contract, file_of
from disttrain_trainer.strategies.turns import ScriptOver, Turns

log = logs.get_logger(__name__)


class _ScriptLoop(TrainingLoop):
    """The loop, of a loss that the script may not tell."""

    def __init__(self, turns: Turns, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._turns = turns

    def _look_at(self, loss: torch.Tensor, part: BatchPart, weight: float | None, values: Values | None) -> None:
        if self._turns.gave_loss:
            super()._look_at(loss, part, weight, values)
        else:
            self._meter.add(part, loss=0.0, weight=0.0)

    def _verify(self) -> None:
        self._model.verify()  # handlers of signals are the main thread's


class _Computed:
    """A model whose gradients are there when the loop comes by."""

    def __init__(self, model: Trained) -> None:
        self.zero_grad, self.verify, self.refuse_unfrozen = model.zero_grad, model.verify, model.refuse_unfrozen

    def refuse_own_backward(self) -> None:
        """It is the script's."""


class ScriptWorker(Worker):
    """A worker whose parts the script computes."""

    def __init__(
        self,
        *,
        process: Process,
        metrics: Metrics,
        control: ControlClient,
        member: ParameterServerMember,
        task: Task,
        turns: Turns,
        state: StateOfScript,
    ) -> None:
        make_loop = partial(_ScriptLoop, turns)
        super().__init__(
            process=process, metrics=metrics, control=control, member=member, task=task, make_loop=make_loop
        )
        self._loop.adopt(_Computed(self._replica.model), turns)
        self._replica.saved_buffers.extra = state.tensors
        self._replica.model.change = "by the script (the step() of an optimizer, a clamp, or an embedding's max_norm)"


class OwnLoop:
    """What the script of this process asks for. For the script's thread, but for `_work`."""

    def __init__(
        self, *, process: Process, metrics: Metrics, control: ControlClient, member: ParameterServerMember
    ) -> None:
        self._process = process
        self._config = process.config
        self._metrics = metrics
        self._control = control
        self._member = member
        self._turns = Turns()
        self._state = StateOfScript()
        self._device = tasks.choose_device(process.config, local_rank=process.machine_rank)
        self._model: nn.Module | None = None
        self._dataset: Any = None
        self._thread: threading.Thread | None = None
        self._accumulates = False
        self._loss: float | None = None

    def adopt(self, model: nn.Module) -> None:
        """The model that the servers train, moved to the device of this process. Raises WrongInput."""
        if not isinstance(model, nn.Module):
            raise WrongInput(f"parameter_server got a {type(model).__name__}; expected a torch.nn.Module")
        if self._model is not None:
            raise WrongInput("parameter_server was called before: the servers train one model")
        prepare(model)
        parameter_groups.check(self._config.trainer.loop.optimizer, [name for name, _ in model.named_parameters()])
        self._model = model.to(self._device)

    def batches(
        self, dataset: Any, batch_size: int | None, collate: Callable[[list[Any]], Any] | None
    ) -> Iterator[Any]:
        """This worker's parts of every batch, on the device. Raises WrongInput at once, and as the training."""
        if self._thread is None:
            self._start(dataset, batch_size, collate)
            self._dataset = dataset
        elif dataset is not self._dataset and not self._turns.over:
            raise WrongInput(
                "batches was called before, with another data set: its iterator gives the batches of all epochs"
            )

        def each() -> Iterator[Any]:
            while batch := self._turns.next():
                yield batch[0]
            self._take_result()

        return each()

    def step(self, loss: Any, weight: float | None) -> None:
        """The gradients of the batch go to the servers; within `no_sync` they stay. Raises as `batches`."""
        if threading.current_thread() is threading.main_thread():
            user_code.keep_sigterm("trainer.script")
        counts = None if weight is None else _number(weight)
        if weight is not None and not (counts is not None and math.isfinite(counts) and counts >= 0):
            raise UserError(
                f"ps.step() got the weight {weight!r:.100}; expected a number of 0 or more, such as the number of tokens"
            )
        if weight is not None and self._accumulates:
            raise UserError(
                "ps.step() got a weight within no_sync(): give it to the last step of the batch, outside, for all its micro-batches"
            )
        mean = None if loss is None else _number(loss)
        if loss is not None and mean is None:
            kind = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise UserError(f"ps.step() got a {kind}; expected the batch's mean loss, a number or a scalar tensor")
        self._turns.check()
        if mean is not None:
            self._loss = (self._loss or 0.0) + mean
        if self._accumulates:
            return
        found, self._loss = self._loss, None
        self._turns.step(found, counts)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """`step` sends nothing: the gradients of the micro-batches of one batch add up."""
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    def state_dict(self) -> dict[str, Any]:
        """A copy of the model's state on the CPU, as this worker pulled it last."""
        assert self._model is not None
        return {
            name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
            for name, value in self._model.state_dict().items()
        }

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Goes with the next checkpoints. Raises WrongInput for what is neither tensor nor JSON."""
        self._state.keep(state)

    def restore(self) -> dict[str, Any] | None:
        """What `checkpoint` was given last before the newest checkpoint; None where there is none.

        It goes with the next checkpoints, too, until `checkpoint` is called.
        """
        root = self._process.checkpoint_dir
        while root is not None and (found := store.newest(root, self._config).checkpoint) is not None:
            file = found.manifest.file_of(store.BUFFERS)
            if file is None:
                break
            try:
                state = read_state(found.folder / file)
            except WrongInput:
                if (found.folder / file).exists():
                    raise
                continue  # it was pruned meanwhile: there is a newer one
            if state is not None:
                self._state.keep_found(state)
            return state
        return None

    def finish(self) -> None:
        """After the script's end. Raises UserError when it ended before the training, and what ended that."""
        self._turns.leave()
        if self._thread is None:
            raise UserError(
                f"the script ended with exit code 0 and has trained nothing: {_USE}"
                if self._model is None
                else "the script ended with exit code 0 and took no batch: iterate over batches(dataset), and call ps.step() for each"
            )
        if not self._turns.over:
            raise UserError(
                "the script ended with exit code 0 before the training was done: iterate over batches(dataset) to its end, or lower "
                "trainer.epochs or maxSteps"
            )
        self._thread.join()
        self._turns.raise_error()  # the script may have caught it

    def _start(self, dataset: Any, batch_size: int | None, collate: Callable[[list[Any]], Any] | None) -> None:
        if self._model is None:
            raise WrongInput("batches was called before parameter_server(model): the servers need the model first")
        trainer = self._config.trainer
        if batch_size is not None and batch_size != trainer.batch_size:
            raise WrongInput(
                f"batches got batch_size={batch_size}, and trainer.batchSize is {trainer.batch_size}: it is the batch of all workers "
                "together, and must be the same in both"
            )
        fetch = fetcher(
            dataset, device=self._device, field="the dataset of batches", collate=collate, seed=trainer.seed
        )
        data = DataSet(len(dataset), fingerprint_of(dataset))
        tasks.seed_process(trainer.seed, rank=self._process.rank, incarnation=self._process.incarnation)
        schedule = Schedule.of(self._config, data.samples)
        task = Task(
            model=self._model,
            make_model=lambda: self._model or nn.Module(),
            loss=cross_entropy,
            schedule=schedule,
            learning_rate=LearningRate(trainer.learning_rate_schedule, schedule.total_steps),
            make_optimizer=None,
            data=data,
            fetch=fetch,
            device=self._device,
            evaluate=None,
            batches_per_step=self._config.parts_per_step,
            seeds_all=trainer.deterministic or fetch.by_sample,
            loading=loading.begin(
                self._config,
                fetch=fetch,
                schedule=Schedule.of(self._config, data.samples),
                dataset=dataset,
                around=partial(user_code.refusing_groups, "trainer.script"),
            ),
        )
        worker = ScriptWorker(
            process=self._process,
            metrics=self._metrics,
            control=self._control,
            member=self._member,
            task=task,
            turns=self._turns,
            state=self._state,
        )
        self._thread = threading.Thread(target=self._work, args=(worker,), name="worker", daemon=True)
        self._thread.start()

    def _work(self, worker: ScriptWorker) -> None:
        error: BaseException | None = None
        try:
            worker.run()
        except ScriptOver:
            return
        except BaseException as raised:
            error = raised
        self._turns.end(error)

    def _take_result(self) -> None:
        """The training is done: another worker may have pulled the last parameters, and has written them."""
        folder, model = self._process.model_dir, self._model
        if folder is None or model is None or not (folder / MODEL_FILE).is_file():
            return
        found, own = tensor_file.read(folder / MODEL_FILE), model.state_dict()
        with torch.no_grad():
            for name, value in found.items():
                if name in own and own[name].shape == value.shape:
                    own[name].copy_(value)


def _number(value: Any) -> float | None:
    """None for what is no number."""
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        return None


_USE = "call parameter_server(model) of disttrain_trainer.session, iterate over its batches(dataset), and call ps.step() for each"
_present: list[OwnLoop] = []
"""That of the script which runs."""


def present() -> OwnLoop | None:
    """That of the script that this process runs; None where it runs none."""
    return _present[0] if _present else None


def run(process: Process, metrics: Metrics, control: ControlClient, member: ParameterServerMember) -> None:
    """The role of a worker that runs a script. Raises what the script raises, ProgramFailed for another exit code than 0."""
    work = process.config.trainer.work
    assert isinstance(work, ScriptLoop)
    file = file_of(work.script, process.config)
    os.environ |= contract(process.config, index=process.index, local_rank=process.local_rank, this_round=Round(1))
    add_current_folder()
    make_importable(os.environ)
    if process.config.trainer.deterministic:
        tasks.be_deterministic()
    own = OwnLoop(process=process, metrics=metrics, control=control, member=member)
    _present[:] = [own]
    tasks.seed_all(process.config.trainer.seed)
    try:
        with user_code.refusing_groups("trainer.script"):
            script_runner.execute(str(file), list(work.script.args))
    except OwnGroup as error:
        raise error.by_script() from None
    except SystemExit as ended:
        if ended.code not in (None, 0):
            code = ended.code if isinstance(ended.code, int) else 1
            raise ProgramFailed(
                code, f"{_name(file)} ended: {ended.code}" if code == 1 else f"{_name(file)} ended with code {code}"
            ) from None
    finally:
        sys.stdout.flush()
    own.finish()


def _name(file: Path) -> str:
    return f"trainer.script: {file.name}"
