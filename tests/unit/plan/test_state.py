"""status.state: the one word of the printer column."""

from disttrain.api.reasons import JobState
from unit.plan.builders import make_job


def test_states_of_a_job_on_its_way():
    scene = make_job()
    states = []
    for change in (
        lambda: None,
        lambda: None,
        scene.all_run,
        lambda: scene.reports(7),
        lambda: scene.succeeded(0, 1, ago=20),
    ):
        change()
        scene.seen()
        states.append(scene.status.state)
    assert states == [JobState.SCHEDULING, JobState.SCHEDULING, JobState.STARTING, JobState.TRAINING, JobState.COMPLETE]


def test_steps_of_an_older_attempt_do_not_make_a_silent_job_a_training_one():
    scene = make_job().rules(default="RestartJob").training().after(5).failed(0).seen().after(1).seen()
    scene.all_run().seen()
    for _ in range(30):
        scene.after(10).step()
    assert scene.says("Progressing") == ("Unknown", "NoReport")
    assert scene.status.state is JobState.STARTING
