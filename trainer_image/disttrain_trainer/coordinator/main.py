"""The role of the master: puts its parts together, and keeps what blocks away from the control connections."""

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from disttrain.api import trainer_status
from disttrain.api.goodput import MasterGoodput
from disttrain.api.mesh import Mesh
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig, Progress
from disttrain.api.strategy import ParameterServerStrategy
from disttrain.api.trainer import Command, Loop, Script
from disttrain_trainer.coordinator.checkpoint_folder import CheckpointFolder
from disttrain_trainer.coordinator.collective import CollectiveCoordinator
from disttrain_trainer.coordinator.command import CommandCoordinator
from disttrain_trainer.coordinator.elastic import ElasticCoordinator
from disttrain_trainer.coordinator.evaluations import Evaluations
from disttrain_trainer.coordinator.grouped import GroupedCoordinator
from disttrain_trainer.coordinator.master_history import MasterHistory
from disttrain_trainer.coordinator.parameter_server import ParameterServerCoordinator
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.coordinator.trainer_status import TrainerStatus, TrainerStatusReports
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.errors import PeerLost, Terminated
from disttrain_trainer.net import transport
from disttrain_trainer.net.control_server import ControlServer
from disttrain_trainer.net.joining import Judge
from disttrain_trainer.net.peers import Coordinator, Member
from disttrain_trainer.net.rendezvous import RendezvousServer
from disttrain_trainer.net.report_signer import ReportSigner
from disttrain_trainer.net.transport import PLAIN
from disttrain_trainer.runtime import exposition, logs, sockets
from disttrain_trainer.runtime.metrics import OF_STEPS, Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import listening_host, own_port, split_address

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # missing in its __all__

log = logs.get_logger(__name__)

T = TypeVar("T")

GOODBYE_SECONDS = 5.0
"""How long the master waits for the other processes to disconnect after it sent them FINISH."""


class Master:
    """The master of one attempt."""

    def __init__(self, process: Process, metrics: Metrics) -> None:
        self._process = process
        self._config: JobConfig = process.config
        self._work = self._config.trainer.work
        self._metrics = metrics
        self._transport = transport.of(self._config, process.tls_dir)
        self._control = ControlServer(config=self._config, transport=self._transport, judge=Judge.of(process))
        self._tracker = Tracker(attempt=self._config.attempt)
        began = datetime.now(UTC).replace(microsecond=0)
        self._goodput = MasterGoodput(time.monotonic(), began=began, steps_done=process.steps_done)
        self._counting = threading.Lock()
        self._store: TCPStore | None = None
        self._rendezvous: RendezvousServer | None = None
        self._folder = self._checkpoint_folder()
        self._coordinator: Coordinator = self._coordinate()
        self._history = MasterHistory(process, self._tracker, self.progress)
        self._control.coordinator = self._coordinator
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    def progress(self) -> Progress:
        """The progress now. Called by the threads of /progress and of scrapes, several at once if they come."""
        with self._counting:
            now = time.monotonic()
            progress = self._tracker.progress(now=now, waiting_for=self._coordinator.waiting_for(now))
            self._goodput.look(progress, now)
            return progress.model_copy(
                update={
                    "goodput": self._goodput.spent if self._tracker.reported else None,
                    "restarts_in_place": self._control.restarts_in_place,
                }
            )

    def count(self) -> None:
        """Brings the master's metrics up to date."""
        progress, metrics, reported = self.progress(), self._metrics, self._tracker.reported
        # The workers of our own loop count for themselves, and a sum over all roles must not count a sample twice.
        tells_samples = reported and not isinstance(self._work, Loop)
        metrics.left_out = OF_STEPS - {"disttrain_lost_steps"} - ({"disttrain_samples"} if tells_samples else set())
        metrics.goodput_seconds = dict(self._goodput.seconds) if reported else {}
        metrics.loss, metrics.values, metrics.epoch = progress.loss, progress.values or {}, progress.epoch
        metrics.step = progress.step if reported or progress.step else None
        # What is over has no speed; the status keeps that of its end.
        metrics.samples_per_second = None if progress.finished else progress.samples_per_second
        metrics.samples, metrics.gradient_norm = self._tracker.samples, self._tracker.gradient_norm
        in_round = self._tracker.lost_workers + self._tracker.promotions
        metrics.recoveries = max(0, progress.generation - 1) + in_round
        metrics.lost_steps = progress.redone_steps
        metrics.dropped_samples = progress.dropped_samples
        metrics.evaluation, metrics.evaluation_step = progress.evaluation or {}, progress.evaluation_step
        metrics.checkpoint_step = progress.last_checkpoint.step if progress.last_checkpoint else None

    def end_history(self) -> None:
        """Writes its last lines: the progress is final. Blocks for seconds where its disk does."""
        self._history.end()

    async def run(self) -> None:
        """Until the job is done; raises Terminated after a SIGTERM, PeerLost when a port is taken."""
        coordinator, control = self._coordinator, self._control
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._terminate)
        host, port = split_address(self._config.addresses.control)
        self._serve_metrics(listening_host(host) or "")
        self._history.begin()
        serving = asyncio.create_task(control.serve(host=listening_host(host), port=port))
        completion = asyncio.create_task(
            control.until(lambda: coordinator.ended or coordinator.released or self._failure is not None)
        )
        self._begin()
        try:
            await asyncio.wait([serving, completion], return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            if self._failure is not None:
                raise self._failure
            # Every process receives its last message before the master closes the connections.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    control.until(lambda: not control.connected), GOODBYE_SECONDS if coordinator.ended else 0.2
                )
            if not coordinator.ended:
                raise Terminated
            self._log_last_step()
        except OSError as error:
            raise PeerLost(f"port {port}", f"the control connection cannot listen: {error.strerror}") from None
        finally:
            # All is decided. A signal while the event loop closes would find the loop's own pipe closed (Python 3.11, unix_events).
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            serving.cancel()
            completion.cancel()

    def _log_last_step(self) -> None:
        """The last line of the log. A program that reports no steps is done, but not at a step."""
        step, total = self._tracker.step, self._tracker.total_steps
        if isinstance(self._work, Loop) or total == step:
            log.info("the job is done at step %d", step)
        elif total is not None:
            log.warning("the programs ended at step %d of the %d that they announced", step, total)
        else:
            log.info("the job is done%s", f"; the last reported step is {step}" if step else "")

    def _serve_metrics(self, host: str) -> None:
        signer = ReportSigner.of(self._config, self._process.tls_dir)

        def progress(nonce: str) -> str | None:
            report = self.progress().model_dump_json(by_alias=True)
            if not nonce:
                return report
            return signer.signed(nonce, report) if signer is not None else None

        if self._process.metrics_port is not None:
            exposition.serve(
                self._metrics,
                host=host,
                port=self._process.metrics_port,
                progress=progress,
                history=self._history.content,
                inbox=self._inbox(),
            )

    def _inbox(self) -> exposition.Inbox | None:
        """Where programs report that know Kubeflow's Trainer."""
        if not isinstance(self._work, Script | Command):
            return None
        loop, reports = asyncio.get_running_loop(), TrainerStatusReports()

        def report(status: TrainerStatus) -> None:
            self._control.report(0, {**reports.message(status), "generation": self._tracker.round_number or None})

        def take(body: bytes) -> None:
            status = TrainerStatus.parse(body)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the job
                loop.call_soon_threadsafe(report, status)

        token = trainer_status.token(self._config.uid, self._config.attempt)
        return exposition.Inbox(trainer_status.PATH, token, take)

    def _terminate(self) -> None:
        self._coordinator.terminate(time.monotonic())
        self._control.poke()

    def _checkpoint_folder(self) -> CheckpointFolder | None:
        root, checkpoint = self._process.checkpoint_dir, self._config.checkpoint
        if root is None or checkpoint is None:
            return None
        return CheckpointFolder(
            root, keep=checkpoint.keep, config=self._config, tracker=self._tracker, run_apart=self._run_apart
        )

    def _coordinate(self) -> Coordinator:
        """The decisions of the job's strategy."""
        config = self._config
        match self._work:
            case Command():
                return CommandCoordinator(tracker=self._tracker, workers=config.workers)
            case Script():
                return self._of_rounds(
                    tuple(Member(Role.WORKER, index) for index in range(config.workers)),
                    renew_store=self._renew_store,
                    processes=config.processes_per_worker,
                    lasting=False,
                    used=lambda: self._store is not None and self._store.num_keys() > 0,
                )
            case Loop() if isinstance(config.strategy.exchange, ParameterServerStrategy):
                coordinator = (
                    ParameterServerCoordinator if config.strategy.model_parallel is None else GroupedCoordinator
                )
                return coordinator(
                    sender=self._control,
                    store=self._folder,
                    tracker=self._tracker,
                    config=config,
                    incarnation=self._process.incarnation,
                )
            case Loop():
                return self._of_rounds(
                    tuple(Member(Role.WORKER, rank) for rank in range(config.world_size)),
                    renew_store=self._renew_store,
                    saves=self._folder is not None,
                    schedule=lambda samples: Schedule.of(config, samples),
                    pieces=_pieces(config),
                    evaluations=Evaluations(config=config, tracker=self._tracker),
                )

    def _of_rounds(self, members: tuple[Member, ...], **options: Any) -> CollectiveCoordinator:
        """The coordinator of rounds with these members, at most. options: as of CollectiveCoordinator."""
        config = self._config
        options = {"sender": self._control, "tracker": self._tracker, "members": members, **options}
        if config.min_workers is None:
            return CollectiveCoordinator(**options)
        each = len(members) // config.workers
        first = self._process.world_size // config.processes_per_worker
        return ElasticCoordinator(
            fewest=config.min_workers * each,
            expected=members[: first * each],
            wake=self._tick_after,
            in_steps=isinstance(self._work, Loop),
            **options,
        )

    def _tick_after(self, seconds: float) -> None:
        async def tick() -> None:
            await asyncio.sleep(seconds)
            self._coordinator.tick(time.monotonic())

        self._keep(tick())

    def _begin(self) -> None:
        coordinator = self._coordinator
        if isinstance(coordinator, CollectiveCoordinator):
            self._renew_store(coordinator.open)
            if isinstance(self._work, Loop) and self._folder is not None:
                self._folder.find(coordinator.found)
        elif isinstance(coordinator, ParameterServerCoordinator):
            if isinstance(coordinator, GroupedCoordinator):
                self._renew_store(coordinator.open)
            coordinator.begin(time.monotonic())

    def _renew_store(self, opened: Callable[[float], None]) -> None:
        """An empty store for torch's rendezvous, on the same port."""
        if self._transport is PLAIN:
            self._renew_torch_store(opened)
            return
        if self._rendezvous is None:
            self._rendezvous = RendezvousServer(context=self._transport.context, processes=self._config.world_size)
            self._keep(self._serve_rendezvous(self._rendezvous))
        else:
            self._rendezvous.renew()

        async def done() -> None:
            opened(time.monotonic())

        self._keep(done())

    def _renew_torch_store(self, opened: Callable[[float], None]) -> None:
        """torch's own, which speaks no TLS. Importing torch takes seconds, in which members already join."""
        self._store = None  # closes the old one: torch puts no round into the keys any more (2.15)

        def host() -> "TCPStore":
            from torch.distributed import TCPStore  # type: ignore[attr-defined]  # missing in its __all__

            # A socket of our own: torch would listen at every address of the machine, whatever address it gets.
            listener = self._listen_for_ranks()
            name, port = split_address(self._config.addresses.rendezvous)
            sockets.defer_silent(listener)
            return TCPStore(
                listening_host(name) or "localhost",
                port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )

        def keep(store: "TCPStore") -> None:
            self._store = store
            opened(time.monotonic())

        self._run_apart(host, keep)

    async def _serve_rendezvous(self, server: RendezvousServer) -> None:
        await server.serve(self._listen_for_ranks())

    def _listen_for_ranks(self) -> socket.socket:
        name, port = split_address(self._config.addresses.rendezvous)
        return own_port("the rendezvous store", listening_host(name), port)

    def _run_apart(self, work: Callable[[], T], answer: Callable[[T], None], executor: Executor | None = None) -> None:
        async def go() -> None:
            answer(await asyncio.get_running_loop().run_in_executor(executor, work))

        self._keep(go())

    def _keep(self, work: Coroutine[object, object, None]) -> None:
        """Runs it beside the rest; what it raises ends the master."""

        async def go() -> None:
            try:
                await work
            except Exception as error:
                self._failure = error
            self._control.poke()

        task = asyncio.get_running_loop().create_task(go())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _pieces(config: JobConfig) -> tuple[tuple[int, ...], ...]:
    """For each piece of a sharded model the ranks that hold copies of it; none where each rank holds all."""
    if not config.strategy.is_sharded:
        return ()
    return Mesh.of(config.strategy, workers=config.workers, processes=config.processes_per_worker).replicas()


def run(process: Process, metrics: Metrics, report: Callable[[Progress], None]) -> None:
    """The role of the master. `report` gets the final progress, however it ends. Raises Terminated after a SIGTERM."""
    master = Master(process, metrics)
    metrics.before_scrape = master.count
    try:
        asyncio.run(master.run())
    finally:
        report(master.progress())
        master.end_history()
