"""The progress that a script or command prints (trainer.progress), on its way from the output to the master."""

from collections.abc import Sequence

from disttrain.api.runtime import JobConfig
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.net.reporter import Reporter
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.output_reader import OutputReader, Printed, ProgressPattern


def readers(
    config: JobConfig, *, ranks: Sequence[int], round_number: int, metrics: Metrics | None = None
) -> tuple[OutputReader, ...]:
    """A reader of the output of each process of these ranks; none where the job names no pattern. Raises WrongInput.

    metrics: get the last step and loss.
    """
    if config.trainer.progress is None:
        return ()
    try:
        pattern = ProgressPattern(config.trainer.progress.pattern)
    except ValueError as error:
        raise WrongInput(f"trainer.progress.pattern: {error}") from None
    reports = [_Reports(config, rank, round_number, metrics) for rank in ranks]
    return tuple(OutputReader(pattern, report.add, report.close, report.hurry) for report in reports)


class _Reports:
    """Reports of one process. The connection is made with the first of them."""

    def __init__(self, config: JobConfig, rank: int, round_number: int, metrics: Metrics | None) -> None:
        self._config, self._rank, self._round_number, self._metrics = config, rank, round_number, metrics
        self._reporter: Reporter | None = None
        self._hurried = False
        self._samples: int | None = None
        """Done by the last line that said it: the first one has what was done before, and counts none."""

    def add(self, printed: Printed) -> None:
        if self._reporter is None:
            self._reporter = Reporter(self._config, self._rank, round_number=self._round_number, output=True)
            if self._hurried:
                self._reporter.hurry()
        samples = 0
        if printed.samples is not None:
            samples = max(0, printed.samples - self._samples) if self._samples is not None else 0
            self._samples = printed.samples
        self._reporter.add(step=printed.step, loss=printed.loss, samples=samples, total_steps=printed.total)
        if self._metrics is not None:
            self._metrics.step = printed.step
            self._metrics.loss = printed.loss if printed.loss is not None else self._metrics.loss

    def hurry(self) -> None:
        self._hurried = True
        if self._reporter is not None:
            self._reporter.hurry()

    def close(self) -> None:
        if self._reporter is not None:
            self._reporter.close()
