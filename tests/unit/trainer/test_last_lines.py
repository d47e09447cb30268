"""What a script said last: its exception, and not what is printed around it."""

from pathlib import Path

import pytest

from disttrain_trainer.runtime.subprocesses import failure_of, find_cause
from disttrain_trainer.runtime.termination import shadowing

TRACE = [
    "Traceback (most recent call last):",
    '  File "/job/train.py", line 7, in <module>',
    "    main()",
    '  File "/usr/lib/python3.11/site-packages/torch/x.py", line 9, in f',
    "    raise ValueError(",
    "ValueError: the real cause",
]


def test_the_exception_is_the_last_word_and_the_users_frame_its_place() -> None:
    assert find_cause(["epoch 1", *TRACE]) == ("ValueError: the real cause", "/job/train.py:7")


def test_noise_after_the_exception_is_not_the_cause() -> None:
    ignored = [
        "Exception ignored in: <function f at 0x1>",
        TRACE[0],
        '  File "/job/z.py", line 1, in f',
        "OSError: closed",
    ]
    assert find_cause([*TRACE, "[W] a warning at exit", *ignored]) == ("ValueError: the real cause", "/job/train.py:7")


def test_of_several_tracebacks_the_last_one_ended_the_program() -> None:
    first = [
        TRACE[0],
        '  File "/job/a.py", line 1, in f',
        "KeyError: 'a'",
        "",
        "During handling of the above exception:",
    ]
    assert find_cause([*(line for line in first if line), *TRACE])[0] == "ValueError: the real cause"


def test_without_a_traceback_the_last_line_counts() -> None:
    assert find_cause(["loading", "error: no data"]) == ("error: no data", "")
    syntax = ['  File "/job/train.py", line 2', "    def f(:", "          ^", "SyntaxError: invalid syntax"]
    assert find_cause(syntax) == ("SyntaxError: invalid syntax", "/job/train.py:2")
    assert find_cause([]) == ("", "")


def test_what_was_printed_last_is_not_the_reason_of_a_kill() -> None:
    assert failure_of(137, ["epoch 3", "step 40 loss 0.1"]).last_line == (
        "the script was killed by SIGKILL (137); last output: step 40 loss 0.1"
    )
    assert failure_of(137, [*TRACE, "that was handled"]).last_line.startswith("the script was killed by SIGKILL (137)")
    assert failure_of(139, []).last_line == "the script was killed by SIGSEGV (139)"
    assert failure_of(3, ["step 40"]).last_line == "the script ended with code 3; last output: step 40"
    failed = failure_of(1, TRACE)
    assert (failed.last_line, failed.where) == ("ValueError: the real cause", "/job/train.py:7")


@pytest.mark.parametrize(
    ("said", "file"),
    [
        ("AttributeError: module 'random' has no attribute 'Random'", "random.py"),
        (
            "AttributeError: partially initialized module 'torch' has no attribute 'nn' (most likely due to …)",
            "torch.py",
        ),
        ("ImportError: cannot import name 'dataclass' from 'dataclasses' (/job/dataclasses.py)", "dataclasses.py"),
        ("ModuleNotFoundError: No module named 'numpy.linalg'; 'numpy' is not a package", "numpy.py"),
        ("ImportError: cannot import name 'Queue' from 'queue' (/job/queue/__init__.py)", "queue/__init__.py"),
    ],
)
def test_a_file_that_hides_a_module_of_python_or_a_library_is_named(tmp_path: Path, said: str, file: str) -> None:
    assert shadowing(said, tmp_path) == ""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert shadowing(said, tmp_path).startswith(
        f"; {tmp_path / file} hides the module {Path(file).parts[0].removesuffix('.py')} "
    )


def test_a_file_of_the_users_own_name_hides_nothing(tmp_path: Path) -> None:
    for name in ("helpers", "copy"):
        (tmp_path / f"{name}.py").touch()
    assert shadowing("AttributeError: module 'helpers' has no attribute 'f'", tmp_path) == ""
    assert shadowing("AttributeError: 'Net' object has no attribute 'copy'", tmp_path) == ""
    assert shadowing("ValueError: no module 'copy'", tmp_path) == ""
