"""DataParallel: rank r computes slice r of every step, gradients are averaged weighted by samples, every rank has the model.

The role of a rank from its start to its end, through lost peers: the survivors keep their model, the newest one gives it to all.
Not here: when a world begins (the master), the process group (group.py), the state (state.py).
"""

import logging
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.api.runtime import JobConfig
from disttrain_trainer import task as tasks
from disttrain_trainer.checkpoint import folder as checkpoints
from disttrain_trainer.control import Control
from disttrain_trainer.errors import TrainerError, UserError
from disttrain_trainer.membership import Rank, World
from disttrain_trainer.messages import Say
from disttrain_trainer.meter import Meter, NonFiniteLoss
from disttrain_trainer.metrics import Metrics
from disttrain_trainer.parallel import state
from disttrain_trainer.parallel.group import is_broken_group, process_group
from disttrain_trainer.process import Process

log = logging.getLogger(__name__)


class _Reform(Exception):
    """The master said that the world is over."""


class DataParallel:
    """One rank of the job."""

    def __init__(self, *, process: Process, metrics: Metrics, control: Control, rank: Rank) -> None:
        self._process = process
        self._config: JobConfig = process.config
        self._metrics = metrics
        self._control = control
        self._rank = rank
        self._task = tasks.build(self._config, local_rank=process.local_rank)
        self._optimizer = tasks.make_optimizer(self._config, self._task.model)
        self._backend = tasks.choose_backend(self._config, self._task.device)
        self._checkpoint_step = -1

    def run(self) -> None:
        """Trains until the master says that the job is done. Raises TrainerError, or what the user's code raises."""
        self._resume()
        while True:
            self._rank.get_ready(self._control)
            world = self._rank.await_world(self._control, timeout=self._config.startup_timeout_seconds)
            if world is None:
                return
            try:
                self._live_in(world)
                return
            except _Reform:
                log.info("the world of generation %d is over: a worker was lost", world.generation)
            except TrainerError:
                raise
            except Exception as error:
                if not is_broken_group(error):
                    raise
                log.warning("generation %d ended: %s", world.generation, str(error).splitlines()[0])
            self._metrics.recoveries += 1

    def _live_in(self, world: World) -> None:
        """One generation: take over the newest state, train to the end, wait for the others."""
        with process_group(self._config, generation=world.generation, rank=self._process.rank, backend=self._backend):
            if self._config.world_size > 1:
                state.broadcast(self._task.model, self._optimizer, source=world.source, device=self._task.device)
                step = torch.tensor([max(self._rank.step, 0)], device=self._task.device)
                torch.distributed.broadcast(step, world.source)
                self._rank.step = int(step.item())
            self._rank.step = max(self._rank.step, 0)
            log.info("generation %d begins at step %d", world.generation, self._rank.step)
            self._train(world)
        self._end(world)

    def _train(self, world: World) -> None:
        config, task, control, rank, metrics = self._config, self._task, self._control, self._rank, self._metrics
        schedule, who, optimizer = task.schedule, self._process.rank, self._optimizer
        saves = self._process.rank == 0 and self._process.checkpoint_dir is not None
        every = config.checkpoint.every_steps if config.checkpoint else 0
        objective = tasks.Objective(task.model, task.loss)
        forward: nn.Module = objective
        if config.world_size > 1:
            forward = DistributedDataParallel(objective, gradient_as_bucket_view=True, broadcast_buffers=True)
        on_gpu = task.device.type == "cuda"
        meter = Meter(
            who=self._process.name,
            metrics=metrics,
            total_steps=schedule.total_steps,
            send=lambda fields: control.send(Say.REPORT, **fields),
        )
        phases, durations = metrics.phase_seconds, metrics.step_seconds
        pending: tuple[torch.Tensor, int, int] | None = None
        piece = None
        clock = time.perf_counter
        try:
            for step in range(rank.step, schedule.total_steps):
                if rank.world is not world:
                    raise _Reform
                began = clock()
                piece = schedule.slice(step * config.world_size + who)
                task.seed(piece)
                batch = task.fetch(piece.indices) if piece.samples else None
                fetched = clock()
                loss = forward(batch)
                # Averaged over ranks by DDP; this makes it an average over samples.
                weight = piece.samples * config.world_size / piece.batch_samples
                if on_gpu:
                    # The loss of the step before is on its way already; asking for this one would wait for the GPU.
                    if pending is not None:
                        self._count(meter, pending)
                    pending = (loss.detach(), step, piece.samples)
                else:
                    self._count(meter, (loss, step, piece.samples))
                computed = clock()
                (loss if weight == 1.0 else loss * weight).backward()  # type: ignore[no-untyped-call]
                reduced = clock()
                optimizer.step()
                optimizer.zero_grad()
                rank.step = step + 1
                ended = clock()
                metrics.steps += 1
                durations.observe(ended - began)
                phases["data"] += fetched - began
                phases["forward"] += computed - fetched
                phases["backward"] += reduced - computed
                phases["optimize"] += ended - reduced
                now = time.monotonic()
                if meter.due(now):
                    meter.report(step=step + 1, epoch=piece.epoch, now=now)
                    control.check()
                if saves and (
                    rank.save_asked or (every and rank.step % every == 0 and rank.step < schedule.total_steps)
                ):
                    if pending is not None:
                        self._count(meter, pending)
                        pending = None
                    self._save()
            if pending is not None:
                self._count(meter, pending)
        except NonFiniteLoss as error:
            control.send(Say.NAN, step=error.step)
            raise
        finally:
            # On every way out: what was computed is told.
            if piece is not None:
                meter.report(step=rank.step, epoch=piece.epoch, now=time.monotonic())

    def _count(self, meter: Meter, computed: tuple[torch.Tensor, int, int]) -> None:
        tensor, step, samples = computed
        loss = tensor.item()
        meter.check(loss, step=step)
        meter.add(loss=loss, samples=samples)

    def _end(self, world: World) -> None:
        """The last step is done: evaluate, save, and wait until everybody is as far. A lost peer leads back to a new world."""
        rank = self._rank
        if self._process.rank == 0:
            if self._task.evaluate is not None and rank.evaluation is None:
                rank.evaluation = self._task.evaluate()
                log.info("evaluation: %s", ", ".join(f"{name} {value:.4f}" for name, value in rank.evaluation.items()))
            if self._process.checkpoint_dir is not None:
                self._save(finished=True)
        rank.get_done(self._control)
        if not rank.await_end(self._control, world):
            raise _Reform

    def _resume(self) -> None:
        """Rank 0 takes the newest checkpoint; the others get its state from rank 0, or from a rank that is further."""
        root = self._process.checkpoint_dir
        if self._process.rank != 0:
            return
        if root is None:
            log.info("there is no checkpoint volume: if all workers are lost, the training begins anew")
            return
        found = checkpoints.newest(root, self._config)
        if found is not None:
            state.adopt(self._task.model, self._optimizer, state.load(found.folder / state.FILE))
            self._rank.step = self._checkpoint_step = found.manifest.step
            self._metrics.checkpoint_step = found.manifest.step

    def _save(self, *, finished: bool = False) -> None:
        """Writes a checkpoint and says so to the master. A full or broken volume is said too; the training goes on."""
        root, rank = self._process.checkpoint_dir, self._rank
        assert root is not None and self._config.checkpoint is not None
        asked, rank.save_asked = rank.save_asked, False
        began = time.perf_counter()
        if not state.all_finite(self._task.model):
            raise UserError(
                f"a parameter is not finite at step {rank.step}: lower trainer.optimizer.learningRate; "
                "no checkpoint of it is written"
            )
        try:
            folder = checkpoints.prepare(root, rank.step)
            tensors = state.tensors_of(self._task.model, self._optimizer)
            path = folder / state.FILE
            checkpoints.write_atomically(path, lambda temporary: state.save(temporary, tensors, step=rank.step))
            manifest = checkpoints.publish(
                folder,
                config=self._config,
                step=rank.step,
                slices=rank.step * self._config.world_size,
                files={state.FILE: checkpoints.sha256_of(path)},
                finished=finished,
                evaluation=rank.evaluation,
            )
            checkpoints.prune(root, keep=self._config.checkpoint.keep)
        except OSError as error:
            log.error("checkpoint of step %d was not written: %s; the training goes on, the one before is intact", rank.step, error)  # fmt: skip
            self._control.send(Say.SAVED, error=str(error), asked=asked)
            return
        self._checkpoint_step = self._metrics.checkpoint_step = rank.step
        duration = time.perf_counter() - began
        self._metrics.checkpoint_seconds.observe(duration)
        self._metrics.phase_seconds["checkpoint"] += duration
        self._control.send(Say.SAVED, step=rank.step, time=manifest.time.isoformat(), asked=asked)


def run(process: Process, metrics: Metrics, control: Control, rank: Rank) -> None:
    """The role of a DataParallel worker."""
    DataParallel(process=process, metrics=metrics, control=control, rank=rank).run()
