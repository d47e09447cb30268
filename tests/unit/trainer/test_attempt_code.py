"""Workers of one attempt train with the same code."""

from typing import Any

from disttrain_trainer.net.attempt_code import AttemptCode
from disttrain_trainer.net.incoming import Hello


def hello(code: str | None, **more: Any) -> Hello:
    return Hello(type="hello", job="u", attempt=1, role="worker", rank=0, incarnation="i", code=code, **more)


def test_the_first_worker_fixes_the_code_and_another_one_is_named() -> None:
    attempt = AttemptCode('ConfigMap "my-code"')
    assert not attempt.take(hello("a" * 64))
    assert not attempt.take(hello("b" * 64))
    assert attempt.objection("worker-0", "a" * 64) is None
    assert attempt.objection("worker-1", "b" * 64) == (
        "trainer.code of worker-1 is not that of this attempt (sha256 bbbbbbbbbbbb, not aaaaaaaaaaaa): "
        'ConfigMap "my-code" was changed while the job runs; undo the change, or create a new job'
    )


def test_a_worker_that_says_nothing_of_its_code_is_of_an_earlier_release_or_has_none() -> None:
    attempt = AttemptCode(None)
    assert not attempt.take(hello(None))
    assert attempt.objection("worker-0", None) is None
    assert attempt.objection("worker-1", "a") is None


def test_after_the_master_was_replaced_a_worker_that_was_admitted_before_decides() -> None:
    attempt = AttemptCode('ConfigMap "my-code"')
    attempt.take(hello("new"))
    assert attempt.take(hello("old", code_admitted=True)), "the newcomer has to go"
    assert attempt.objection("worker-0", "new")
    assert not attempt.take(hello("new", code_admitted=True)), "the first such worker has decided"
    assert attempt.objection("worker-1", "old") is None
