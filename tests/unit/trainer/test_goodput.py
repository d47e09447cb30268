"""Every second of an attempt goes to one bucket."""

from disttrain.api.runtime import Progress
from disttrain_trainer.master.goodput import Goodput


def test_time_goes_to_what_the_job_is_seen_doing() -> None:
    goodput = Goodput(now=100.0)
    for now, step, waiting in [
        (103.0, 0, "worker-1 (3 s)"),  # starting
        (105.0, 10, None),
        (110.0, 20, None),
        (112.0, 20, "parameter-server-0 (2 s)"),  # stalled
        (113.0, 12, None),  # back at the checkpoint: redone until step 20 is there again
        (116.0, 20, None),
        (120.0, 30, None),
    ]:
        goodput.look(Progress(attempt=1, step=step, waiting_for=waiting), now)
    goodput.look(Progress(attempt=1, step=30, finished=True), 150.0)
    assert goodput.seconds == {"starting": 3.0, "productive": 11.0, "redone": 4.0, "stalled": 2.0}
