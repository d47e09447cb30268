"""A silent master: its peers gave it up, and it neither fails nor answers."""

from disttrain.api.reasons import Reason
from disttrain.plan.model import Phase
from unit.plan.builders import MASTER, deleted, make_job


class TestSilentMaster:
    """A master that is frozen: it does not fail, and no process receives anything from it."""

    def frozen(self):
        return make_job().training().after(5).reports(11).seen().after(61).failed(0, code=75).failed(1, code=75)

    def test_lost_peers_and_silence_together_replace_it_and_count_once(self):
        scene = self.frozen()
        master = scene.pod(0, MASTER)
        assert scene.step().actions == (), "it is written down first"
        assert master.uid in scene.status.restarts.accounted
        assert deleted(scene.step()) == ["digits-master-0"]
        assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (3, 1)
        assert scene.status.restarts.last.role == "Master"
        assert scene.says("Restarting") == ("True", "MasterSilent")
        scene.after(1).seen().all_run().seen()
        assert scene.says("Restarting") == ("False", "Recovered")
        assert scene.status.restarts.total == 3

    def test_not_while_the_operator_can_read_it(self):
        scene = self.frozen().reports(10)
        assert deleted(scene.step()) == []
        assert scene.status.restarts.counted_towards_limit == 0

    def test_not_when_its_whole_node_is_silent(self):
        scene = self.frozen().run_policy(backoffLimit=0).node_falls_silent(0, MASTER)
        assert [name for _ in range(3) for name in deleted(scene.step()) if name == "digits-master-0"] == []
        assert scene.says("Restarting") == ("True", "NodeLost")
        assert scene.status.restarts.counted_towards_limit == 0

    def test_not_when_it_never_reported(self):
        scene = make_job().started().after(61).failed(0, code=75)
        assert deleted(scene.step()) == []

    def test_not_when_it_is_new_and_the_report_is_of_its_predecessor(self):
        scene = self.frozen()
        scene.change(0, MASTER, created=scene.now)
        assert deleted(scene.step()) == []

    def test_not_without_peers_that_gave_it_up(self):
        scene = make_job().training().after(61)
        assert deleted(scene.step()) == []

    def test_a_write_that_is_refused_loses_neither_the_count_nor_the_event(self):
        scene = self.frozen()
        assert scene.plan().actions == scene.plan().actions == ()  # 409: decided, and not stored
        plan = scene.step()
        assert [event.reason for event in plan.events] == [Reason.MASTER_SILENT]
        assert scene.status.restarts.counted_towards_limit == 1

    def test_what_its_peers_do_before_it_is_gone_is_its_consequence(self):
        scene = self.frozen()
        scene.change(1, phase=Phase.RUNNING, exit_code=None, finished=None).step()
        scene.failed(1, code=75).step()
        assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (3, 1)
        assert scene.status.restarts.last.reason == "MasterSilent"
        assert deleted(scene.step()) == ["digits-master-0"]

    def test_it_is_not_counted_again_when_it_ends_before_it_is_deleted(self):
        scene = self.frozen()
        scene.step()
        scene.failed(0, MASTER, code=134).after(1).step()
        assert "digits-master-0" not in scene.pods
        assert scene.status.restarts.counted_towards_limit == 1

    def test_it_uses_the_limit_up(self):
        scene = self.frozen().run_policy(backoffLimit=0)
        scene.step()
        assert scene.says("Failed") == ("True", "BackoffLimitExceeded")


def test_a_silent_master_is_not_blamed_for_what_a_cause_that_waits_explains() -> None:
    scene = make_job().training().after(5).reports(11).seen().after(61)
    scene.failed(0).seen().after(0.5).failed(1, code=134).seen(1)
    assert scene.status.restarts.counted_towards_limit == 1
