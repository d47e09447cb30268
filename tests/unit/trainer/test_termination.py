"""What a process says: its metrics, its termination message, and the reports of a script that no job runs."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from disttrain.api.names import Role
from disttrain.api.termination import Termination
from disttrain_trainer import session
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.factories import resolve
from disttrain_trainer.runtime import termination
from disttrain_trainer.runtime.machine import cpu_limit, interface_toward
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from unit.trainer.configs import command_config

CONFIG = command_config()


def exposed(metrics: Metrics) -> str:
    registry = CollectorRegistry()
    registry.register(metrics)
    return generate_latest(registry).decode()


def test_metrics_have_the_names_and_labels_of_the_contract() -> None:
    metrics = Metrics(Process(config=CONFIG, role=Role.WORKER, index=0))
    metrics.loss, metrics.step, metrics.epoch, metrics.steps, metrics.samples = 0.5, 3, 1, 3, 192
    metrics.phase_seconds["forward"] = 1.5
    metrics.step_seconds.observe(0.002)
    text = exposed(metrics)
    labels = 'job_name="job",namespace="team",rank="0",role="worker"'
    for line in (
        f"disttrain_loss{{{labels}}} 0.5",
        f"disttrain_step{{{labels}}} 3.0",
        f"disttrain_steps_total{{{labels}}} 3.0",
        f"disttrain_samples_total{{{labels}}} 192.0",
        'disttrain_step_phase_seconds_total{job_name="job",namespace="team",phase="forward",rank="0",role="worker"} 1.5',
        'disttrain_step_duration_seconds_bucket{job_name="job",le="0.0025",namespace="team",rank="0",role="worker"} 1.0',
        f"disttrain_step_duration_seconds_count{{{labels}}} 1.0",
    ):
        assert line in text


def test_what_a_role_does_not_know_it_does_not_expose() -> None:
    text = exposed(Metrics(Process(config=CONFIG, role=Role.PARAMETER_SERVER, index=0)))
    assert "disttrain_loss" not in text
    assert "disttrain_step_duration_seconds" not in text
    assert "disttrain_ps_staleness_steps_bucket" in text


def test_a_traceback_begins_with_the_users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_module.py").write_text("def f():\n    return 1 / 0\n\nf()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError) as raised:
        resolve("trainer.model", "users_module:f")
    # This test's own frame stands for the caller of the trainer.
    trace = raised.value.__traceback__
    assert trace is not None
    shown, reported = termination.of_user_error(raised.value.with_traceback(trace.tb_next))
    assert "factories.py" not in shown
    assert "importlib" not in shown
    assert reported.message == "ZeroDivisionError: division by zero"
    assert reported.where == f"{tmp_path}/users_module.py:2"


def test_a_loss_that_calls_backward_itself_is_told_to_leave_it_to_the_loop() -> None:
    import torch

    weight = torch.ones(2, requires_grad=True)
    loss = (weight * weight).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError) as raised:
        loss.backward()  # type: ignore[no-untyped-call]
    said = termination.of_user_error(raised.value)[1].message
    assert said.startswith("RuntimeError: Trying to backward through the graph a second time")
    assert said.endswith("keep no tensor that has a graph from one call to the next")
    assert "remove the call in trainer.loss" in said


def test_a_syntax_error_is_placed_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_syntax.py").write_text("x = 1\ndef f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SyntaxError) as raised:
        resolve("trainer.model", "users_syntax:f")
    trace = raised.value.__traceback__
    assert trace is not None
    shown, reported = termination.of_user_error(raised.value.with_traceback(trace.tb_next))
    assert "factories.py" not in shown
    assert reported.where == f"{tmp_path}/users_syntax.py:2"


def test_a_module_that_a_users_module_misses_is_the_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_import.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError):
        resolve("trainer.model", "users_import:f")
    with pytest.raises(WrongInput, match="there is no module 'no_such_package'"):
        resolve("trainer.model", "no_such_package.models:f")


def test_a_report_outside_of_disttrain_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTTRAIN_JOB", raising=False)
    session.report(step=1, loss=0.5, samples=3)
    session.close()
    assert session.checkpoint_dir() is None


def test_session_and_metrics_leave_torch_out() -> None:
    code = "import sys, disttrain_trainer.session, disttrain_trainer.runtime.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("text", "limit"), [("max 100000", None), ("50000 100000", 1), ("150000 100000", 2)])
def test_the_cpu_limit_is_the_quota_rounded_up(tmp_path: Path, text: str, limit: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    available = cpu_limit(tmp_path / "nowhere")
    assert cpu_limit(tmp_path) == min(limit or available, available)


def test_the_interface_toward_loopback_is_loopback() -> None:
    assert interface_toward("127.0.0.1") == "lo"


def test_a_factory_that_names_a_file_gets_the_name_of_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongInput, match=r"names a file; write the module, spiral:model"):
        resolve("trainer.model", "spiral.py:model")


def test_of_two_threads_that_end_the_process_the_first_leaves_its_message_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, write, codes = termination.Ending(), termination.write, list[int]()

    def end(code: int, message: str) -> None:
        codes.append(ending.end(code, tmp_path / "message", Termination(message=message)))

    def slowly(path: Path | None, message: Termination) -> None:
        other.start()
        other.join(0.2)
        assert other.is_alive(), "it does not end the process while this one writes"
        write(path, message)

    monkeypatch.setattr(termination, "write", slowly)
    other = threading.Thread(target=end, args=(75, "the second"))
    end(143, "the first")
    other.join(20)
    assert codes == [143, 143]
    assert Termination.decode((tmp_path / "message").read_text()).message == "the first"
