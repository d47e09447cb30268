"""What all ranks of a training with collectives train: the first one that is ready says it, and each other one must have the same. Pure."""

from collections.abc import Callable

from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.data.schedule import DataSet, Schedule
from disttrain_trainer.net.messages import Message
from disttrain_trainer.net.peers import Member


class CommonTask:
    """Data set and layout of the model, as the first rank that was ready had them."""

    def __init__(self, *, tracker: Tracker, schedule: Callable[[int], Schedule] | None) -> None:
        """schedule: see CollectiveCoordinator."""
        self._tracker = tracker
        self._schedule = schedule
        self._task: tuple[DataSet, str] | None = None

    def misfit(self, member: Member, message: Message) -> str | None:
        """What a rank trains that the others do not, in words for the user. Ranks that train different things would wait for one another
        for ever, or add up what does not belong together. None: it fits, or has not said it yet."""
        layout = message.get("layout")
        if message.get("samples") is None or layout is None:
            return None
        data = DataSet.of(message)
        self._tracker.repeats_data = self._tracker.repeats_data or bool(message.get("repeats_data"))
        if self._task is None:
            self._task = (data, layout)
            if self._schedule is not None:
                self._tracker.plan(self._schedule(data.samples))
        if self._task == (data, layout):
            return None
        if data != self._task[0]:
            return f"{member} has {data.difference(self._task[0])}: trainer.dataset must be the same everywhere"
        return (
            f"{member} has another model than the others: trainer.model must make the same parameters and buffers everywhere, and "
            "all images must be of one release"
        )
