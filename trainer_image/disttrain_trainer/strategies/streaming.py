"""A rank that reads a stream: where it goes on in each round, and what it saves of it with the checkpoints."""

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint.stream_positions import StreamPositions
from disttrain_trainer.data.schedule import Schedule, parts_of
from disttrain_trainer.data.stream import Stream
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.process import Process

log = logs.get_logger(__name__)


class Streaming:
    """Of one rank of DataParallel, which has the same place in every round."""

    def __init__(self, stream: Stream, process: Process, schedule: Schedule) -> None:
        config: JobConfig = process.config
        self._stream = stream
        self._rank, self._ranks = process.rank, config.world_size
        parts = parts_of(process.rank, ranks=config.world_size, parts_per_step=config.parts_per_step)
        self._samples = sum(schedule.part(number).samples for number in parts)
        """That this rank takes in each step."""
        root = process.checkpoint_dir if config.checkpoint is not None else None
        keep = config.checkpoint.keep if config.checkpoint is not None else 0
        self._positions = None if root is None else StreamPositions(root, rank=self._rank, ranks=self._ranks, keep=keep)

    def seek(self, step: int) -> None:
        """A round begins with this step. A rank that has read its samples, or comes to them next, goes on; any other finds the newest
        position before it, and passes over what was taken since. Raises what the user's code raises."""
        stream = self._stream
        if stream.begun and step in (stream.next_step - 1, stream.next_step):
            return
        if not stream.stateful:
            if step:
                log.warning(
                    "trainer.dataset has no state_dict(): rank %d reads its stream from the beginning again at step %d",
                    self._rank,
                    step,
                )
            stream.begin(None, skip=0, step=step)
            return
        found = self._positions.newest(step) if self._positions is not None else None
        at, position = found or (0, None)
        stream.begin(position, skip=(step - at) * self._samples, step=step)
        if step:
            log.info(
                "rank %d goes on with its stream at step %d, %d steps after a position of it",
                self._rank,
                step,
                step - at,
            )

    def save(self, step: int) -> None:
        """Before this step is read. A volume that is full is logged: a later position, or an earlier one, serves as well."""
        if self._positions is None or not self._stream.stateful:
            return
        try:
            self._positions.write(step, self._stream.position())
        except OSError as error:
            log.error("the position of the stream at step %d was not written: %s", step, error)
