"""What a user is told of a wrong file: the line, the path, the value, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.cli.files import WrongInput, read
from disttrain.cli.yaml_lines import YamlError, load

JOB = """\
apiVersion: disttrain.dev/v1alpha1
kind: DistTrainJob
metadata:
  name: digits
spec:
  strategy:
    type: DataParallel
  trainer:
    command: [python, -m, mine]
"""


def problems(text: str) -> list[str]:
    with pytest.raises(WrongInput) as wrong:
        read("job.yaml", text)
    return [str(problem) for problem in wrong.value.problems]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        pytest.param(
            "  trainer:\n",
            "  trainer:\n    batchSize: x\n",
            'job.yaml:9: spec.trainer.batchSize: Input should be a valid integer (got "x"); '
            "it is: Samples of one step over all workers together. Default: 64.",
            id="a wrong type",
        ),
        pytest.param(
            "DataParallel",
            "dataparallel",
            "job.yaml:7: spec.strategy.type: Input should be 'DataParallel', 'ParameterServer', 'ModelParallel' or 'Hybrid' "
            '(got "dataparallel"); it is: DataParallel, ParameterServer, ModelParallel or Hybrid.',
            id="a wrong choice",
        ),
        pytest.param(
            "  trainer:\n",
            "  wokers: {replicas: 2}\n  trainer:\n",
            'job.yaml:8: spec.wokers: unknown field; did you mean "worker"?',
            id="a typo",
        ),
        pytest.param(
            "  trainer:\n",
            "  epochs: 3\n  trainer:\n",
            "job.yaml:8: spec.epochs: unknown field; it belongs to spec.trainer",
            id="a field in the wrong place",
        ),
        pytest.param(
            "    type: DataParallel\n",
            "    parameterServer: {consistency: Sync}\n    type: DataParallel\n",
            "job.yaml:7: spec.strategy.parameterServer: set it with type ParameterServer, and only then",
            id="a rule, with the line of the field it blames",
        ),
        pytest.param(
            "    command: [python, -m, mine]\n",
            "    model: a:b\n    dataset: a:c\n    epochs: 1\n",
            'job.yaml:8: spec.trainer.optimizer: with a model set the optimizer, such as {name: SGD, learningRate: "0.1"}',
            id="something missing, with the line around it",
        ),
        pytest.param("  name: digits\n", "  labels: {}\n", "job.yaml:3: metadata.name: is required", id="no name"),
        pytest.param(
            "  name: digits\n",
            "  name: Digits\n",
            "job.yaml:4: metadata.name: must be an RFC 1035 label",
            id="a wrong name",
        ),
        pytest.param(
            "kind: DistTrainJob",
            "kind: DistTrainjob",
            'job.yaml:2: kind: unknown kind "DistTrainjob"; did you mean "DistTrainJob"?',
            id="a wrong kind",
        ),
        pytest.param(
            "apiVersion: disttrain.dev/v1alpha1\n",
            "",
            "job.yaml:1: apiVersion: is required; it is disttrain.dev/v1alpha1",
            id="no version",
        ),
        pytest.param(
            "    type:",
            "    type: Hybrid\n    type:",
            "job.yaml:8: key 'type' is given twice, first in line 7",
            id="a key twice",
        ),
        pytest.param("    type: DataParallel", "   type: [", "job.yaml:9: not YAML: ", id="not YAML"),
        pytest.param(
            "[python, -m, mine]", "[a: b, !!python/object:os.system x]", "job.yaml:9: ", id="no Python objects"
        ),
        pytest.param(
            "mine]", '"\x07"]', "job.yaml:9: not YAML: character #x0007 is not allowed", id="a control character"
        ),
    ],
)
def test_every_problem_has_its_line_and_says_what_to_do(old: str, new: str, told: str) -> None:
    (problem,) = problems(JOB.replace(old, new, 1))
    assert problem.startswith(told)


def test_all_problems_are_told_at_once_in_the_order_of_the_lines() -> None:
    text = JOB.replace("DataParallel", "X") + "  worker: {replicas: 0}\n---\n" + JOB.replace("digits", "DIGITS")
    assert [problem.split(": ")[0] for problem in problems(text)] == ["job.yaml:7", "job.yaml:10", "job.yaml:15"]


def test_two_documents_of_one_name_are_told() -> None:
    assert problems(JOB + "---\n" + JOB) == ["job.yaml:14: DistTrainJob digits is already in line 1"]


def test_a_file_without_a_job() -> None:
    (problem,) = problems("kind: ConfigMap\nmetadata: {name: a}\n")
    assert problem.startswith(
        "job.yaml:1: holds no DistTrainJob; it needs a document with apiVersion: disttrain.dev/v1alpha1"
    )
    assert problems("")[0].startswith("job.yaml:1: holds no DistTrainJob")
    assert problems("just text\n")[0].startswith("job.yaml:1: a document must be an object")


def test_other_kinds_are_left_alone_with_a_word() -> None:
    file = read("job.yaml", JOB + "---\nkind: Namespace\nmetadata: {name: a}\n")
    assert [found.job.metadata.name for found in file.jobs] == ["digits"]
    (warning,) = file.warnings
    assert str(warning).startswith(
        'job.yaml:11: warning: kind: unknown kind "Namespace"; this command knows DistTrainJob'
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"nowhere.yaml:1: cannot be read: No such file or directory; check the path"):
        read(str(tmp_path / "nowhere.yaml"))


def test_a_long_value_is_not_repeated_in_full() -> None:
    (problem,) = problems(JOB.replace("DataParallel", "x" * 5000))
    assert len(problem) < 500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000), ("1.0", 1), ("0.5", 0.5), ("1e-4", 0.0001), ("010", 8), ("0x10", 16), ("1_000", 1000), ("-3", -3),
        ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("1.2.3", "1.2.3"), ("''", ""), ("+", "+"),
        ("yes", True), ("off", False), ("~", None),
    ],
)  # fmt: skip
def test_a_scalar_is_what_kubectl_takes_it_for(text: str, value: object) -> None:
    (document,) = load(f"a: {text}")
    assert document.value == {"a": value}
    assert type(document.value["a"]) is type(value)


@pytest.mark.parametrize("text", [".nan", ".inf", "!!binary aGk=", "? [a]\n: b"])
def test_what_json_has_no_word_for_is_refused(text: str) -> None:
    with pytest.raises(YamlError):
        load(f"a:\n  {text}" if text.startswith("?") else f"a: {text}")


def test_anchors_and_merge_keys_work_within_reason() -> None:
    (document,) = load("base: &b {x: 1, y: 2}\nuse: {<<: *b, y: 3}\nagain: *b\n")
    assert document.value["use"] == {"x": 1, "y": 3}
    with pytest.raises(YamlError, match="nested"):
        load("[" * 5000)
