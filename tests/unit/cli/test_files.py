"""What a user is told of a wrong file: the line, the path, the value, and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from disttrain.cli.files import WrongInput, read
from disttrain.cli.lint import lint
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


MODEL = """\
apiVersion: disttrain.dev/v1alpha1
kind: DistTrainJob
metadata: {name: digits}
spec:
  strategy:
    type: ParameterServer
    parameterServer:
      consistency: Async
      replication: 1
  trainer:
    model: a:model
    dataset: a:dataset
    optimizer: {name: SGD, learningRate: "0.1"}
    epochs: 1
    batchSize: 64
    backend: Auto
    deterministic: false
  parameterServer: {replicas: 2}
  worker:
    replicas: 8
    template:
      spec:
        containers:
        - name: trainer
          env:
          - name: MINE
            value: x
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "batchSize: 64",
            "batchSize: 4",
            r"15: spec.trainer.batchSize: trainer.batchSize is global and must .* (got 4)",
        ),
        ("backend: Auto", "backend: nccl", r"16: spec.trainer.backend: backend nccl needs .* (got nccl)"),
        ("c: false", "c: true", r"17: spec.trainer.deterministic: deterministic needs consistency Sync.* (got true)"),
        ("n: 1", "n: 3", r"9: spec.strategy.parameterServer.replication: must be at most .* (got 3)"),
        (
            "MINE",
            "RANK",
            r"26: spec.worker.template.spec.containers[0].env[0].name: this variable is set .* (got RANK)",
        ),
        ("name: trainer", "name: pytorch", r"24: spec.worker.template.spec.containers[0].name: .* (got pytorch)"),
    ],
)
def test_a_rule_between_fields_tells_the_line_and_the_value_of_the_one_to_blame(old: str, new: str, told: str) -> None:
    (problem,) = problems(MODEL.replace(old, new, 1))
    assert re.fullmatch(re.escape("job.yaml:" + told).replace(r"\.\*", ".*"), problem), problem


def test_names_of_python_are_unknown_as_on_the_api_server() -> None:
    (problem,) = problems(MODEL.replace("batchSize", "batch_size"))
    assert problem == 'job.yaml:15: spec.trainer.batch_size: unknown field; did you mean "batchSize"?'


def test_what_no_process_can_be_handed_is_told_with_its_line() -> None:
    (problem,) = problems(
        MODEL.replace("    epochs: 1\n", f"    epochs: 1\n    config:\n      text: {'x' * 200_000}\n")
    )
    assert problem.startswith("job.yaml:15: spec.trainer.config: the configuration of a training process has 200")
    assert problem.endswith("at most 102400: read large settings from a file or volume")


def test_all_problems_are_told_at_once_in_the_order_of_the_lines() -> None:
    text = JOB.replace("DataParallel", "X") + "  worker: {replicas: 0}\n---\n" + JOB.replace("digits", "DIGITS")
    assert [problem.split(": ")[0] for problem in problems(text)] == ["job.yaml:7", "job.yaml:10", "job.yaml:15"]


def test_two_documents_of_one_name_are_told() -> None:
    assert problems(JOB + "---\n" + JOB) == ["job.yaml:14: DistTrainJob digits is already in line 1"]


def test_two_documents_of_one_name_in_two_namespaces_are_two() -> None:
    other = JOB.replace("  name: digits\n", "  name: digits\n  namespace: other\n")
    assert [found.job.metadata.namespace for found in read("job.yaml", JOB + "---\n" + other).jobs] == [
        "default",
        "other",
    ]
    default = other.replace("namespace: other", "namespace: default")
    assert problems(JOB + "---\n" + default) == ["job.yaml:14: DistTrainJob digits is already in line 1"]


def test_json_is_read_with_its_lines_also_where_tabs_indent_it() -> None:
    (document,) = load(JOB)
    text = json.dumps(document.value, indent="\t")
    assert read("job.json", text).jobs[0].job == read("job.yaml", JOB).jobs[0].job
    assert problems(text.replace("DataParallel", "X"))[0].startswith("job.yaml:9: spec.strategy.type: ")
    with pytest.raises(YamlError, match="cannot start any token"):
        load("a:\n\tb: 1\n")


def test_characters_that_json_escapes_in_two_halves_are_one() -> None:
    text = "a \U0001f600 and \u00fc"
    assert load(json.dumps({"a": text}))[0].value == {"a": text}
    with pytest.raises(YamlError, match="half of a surrogate pair"):
        load('{"a": "\\ud83d"}')


def test_lint_points_at_what_this_version_does_not_support(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(MODEL.replace("consistency: Async", "consistency: Sync").replace("n: 1\n", "n: 2\n", 1))
    assert lint([str(file)]) == 2
    assert (
        f"{file}:9: spec.strategy.parameterServer.replication: strategy.parameterServer.replication above 1 "
        "is not supported by this version"
    ) in capsys.readouterr().err


def test_a_configmap_and_a_secret_are_checked_as_the_api_server_would_with_their_own_lines() -> None:
    config = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  n: 1\n"
    secret = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: b}\ndata:\n  key: pässword\n"
    before = len(JOB.splitlines())
    told = problems(JOB + config + secret)
    assert [one.partition(" ")[0] for one in told] == [f"job.yaml:{before + 6}:", f"job.yaml:{before + 12}:"]
    assert "data.n: must be a string" in told[0]
    assert "data.key: must be base64; plain text belongs into stringData" in told[1]


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
