"""Which of the reports that are read from the output of programs count. Pure."""

from disttrain_trainer.net.messages import Message


class PrintedReports:
    """Of a job whose processes may all print the same lines, or only one of them: rank 0, or as some trainers have it the last.

    The step is the largest that any process prints, and the loss the mean of what they print. Samples are those of the whole job, so that
    one process counts: the lowest rank that prints them in a round.
    """

    def __init__(self) -> None:
        self._session = False
        """A program reports by `session.report`, which says more: nothing that is printed counts."""
        self._round = 0
        self._counting: int | None = None
        """The rank whose samples count."""

    def admit(self, rank: int, message: Message) -> Message | None:
        """What counts of a report; None where nothing does."""
        if not message.get("output"):
            self._session = True
            return message
        if self._session:
            return None
        round_number = int(message.get("generation") or 0)
        if round_number > self._round:
            self._round, self._counting = round_number, None
        if not message.get("samples"):
            return message
        if self._counting is None or rank < self._counting:
            self._counting = rank
        return message if rank == self._counting else {**message, "samples": 0, "loss": _mean(message)}


def _mean(message: Message) -> float | None:
    """A report has the sum of the losses of its samples, or one loss where it has no samples."""
    loss = message.get("loss")
    return None if loss is None else loss / message["samples"]
