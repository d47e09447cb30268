"""What a user reads about a wrong file: the line, the path, the value, and what to do."""

from __future__ import annotations

import io
import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from disttrain.cli.files import WrongInput, read
from disttrain.cli.lint import lint
from disttrain.cli.yaml_lines import Value, load

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


def loaded(text: str) -> list[Value]:
    contents = load(text)
    assert not contents.faults
    return list(contents.documents)


def faults(text: str) -> list[str]:
    return [f"{fault.line}: {fault.message}" for fault in load(text).faults]


def problems(text: str) -> list[str]:
    with pytest.raises(WrongInput) as wrong:
        read("job.yaml", text)
    return [str(problem) for problem in wrong.value.problems]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(
            "  trainer:\n",
            "  trainer:\n    batchSize: x\n",
            'job.yaml:9: spec.trainer.batchSize: Input should be a valid integer (got "x"); '
            "it is: Samples of one step over all workers together. Default: 64.",
            id="a wrong type",
        ),
        pytest.param(
            "  trainer:\n",
            "  checkpoint: {volume: {persistentVolumeClaim: ckpt}, from: Digits}\n  trainer:\n",
            "job.yaml:8: spec.checkpoint.from: must be the name of a job, or an object such as {job: digits, step: 100} "
            '(got "Digits")',
            id="neither a name nor an object",
        ),
        pytest.param(
            "  trainer:\n",
            "  checkpoint: {volume: {persistentVolumeClaim: ckpt}, everySteps: 1, from: {job: digits, uid: newest}}\n  trainer:\n",
            "job.yaml:8: spec.checkpoint.from.uid: String should match pattern "
            "'^[0-9a-f]{8}((-[0-9a-f]{4}){3}-[0-9a-f]{12})?$' (got \"newest\"); it is: Of several jobs of the name the one with this uid, "
            "whole or its first 8 characters, as in the name of its folder on the claim. Default: the newest.",
            id="a description of two lines",
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
            "job.yaml:7: spec.strategy.parameterServer: set it with type ParameterServer, or Hybrid without dataParallel, and only then",
            id="a rule, with the line of the field it blames",
        ),
        pytest.param(
            "    command: [python, -m, mine]\n",
            "    model: a:b\n    dataset: a:c\n    epochs: 1\n",
            "job.yaml:8: spec.trainer.optimizer: with a model set the optimizer, such as {name: SGD, learningRate: 0.1}",
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
            "[python, -m, mine]", "[python, !!python/object:os.system x]", "job.yaml:9: ", id="no Python objects"
        ),
        pytest.param(
            "mine]", '"\x07"]', "job.yaml:9: not YAML: character #x0007 is not allowed", id="a control character"
        ),
    ],
)
def test_every_problem_has_its_line_and_says_what_to_do(old: str, new: str, expected: str) -> None:
    (problem,) = problems(JOB.replace(old, new, 1))
    assert problem.startswith(expected)


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
    optimizer: {name: SGD, learningRate: 0.1}
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
    ("old", "new", "expected"),
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
def test_a_rule_between_fields_tells_the_line_and_the_value_of_the_one_to_blame(
    old: str, new: str, expected: str
) -> None:
    (problem,) = problems(MODEL.replace(old, new, 1))
    assert re.fullmatch(re.escape("job.yaml:" + expected).replace(r"\.\*", ".*"), problem), problem


def test_a_number_in_quotes_is_refused_with_what_to_write() -> None:
    (problem,) = problems(MODEL.replace("0.1", '"0.003"'))
    path = "job.yaml:13: spec.trainer.optimizer.learningRate"
    assert problem.startswith(f'{path}: write 0.003 without quotes (got "0.003"); it is: Step size')
    assert "\n" not in problem


@pytest.mark.parametrize(("field", "value"), [("partsPerStep", "4"), ("seed", "7"), ("findUnusedParameters", "true")])
def test_a_whole_number_or_a_truth_value_in_quotes_is_refused_with_what_to_write(field: str, value: str) -> None:
    (problem,) = problems(MODEL.replace("  trainer:\n", f'  trainer:\n    {field}: "{value}"\n'))
    assert f' spec.trainer.{field}: write {value} without quotes (got "{value}"); it is: ' in problem


@pytest.mark.parametrize(("field", "value"), [("partsPerStep", "true"), ("findUnusedParameters", "4")])
def test_what_would_be_wrong_without_quotes_too_is_not_said_to_be_right(field: str, value: str) -> None:
    (problem,) = problems(MODEL.replace("  trainer:\n", f'  trainer:\n    {field}: "{value}"\n'))
    assert "without quotes" not in problem


@pytest.mark.parametrize("wrong", ["fast", "true", "1e999", "-0.1", "[1]"])
def test_what_is_no_number_is_refused_in_one_line(wrong: str) -> None:
    (problem,) = problems(MODEL.replace("0.1", wrong))
    assert problem.startswith("job.yaml:13: spec.trainer.optimizer.learningRate: ")


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("1", 1.0), ("0.003", 0.003), (".5", 0.5)])
def test_a_number_is_read_as_kubectl_reads_it(text: str, value: float) -> None:
    (found,) = read("job.yaml", MODEL.replace("0.1", text)).jobs
    optimizer = found.job.spec.trainer.optimizer
    assert optimizer
    assert optimizer.learning_rate == value
    assert json.loads(json.dumps(found.job.to_dict()))["spec"]["trainer"]["optimizer"]["learningRate"] == value


def test_names_of_python_are_unknown_as_on_the_api_server() -> None:
    (problem,) = problems(MODEL.replace("batchSize", "batch_size"))
    assert problem == 'job.yaml:15: spec.trainer.batch_size: unknown field; did you mean "batchSize"?'


def test_what_no_process_can_be_handed_is_reported_with_its_line() -> None:
    (problem,) = problems(
        MODEL.replace("    epochs: 1\n", f"    epochs: 1\n    config:\n      text: {'x' * 200_000}\n")
    )
    assert problem.startswith(
        "job.yaml:15: spec.trainer.config: the configuration of a training process has 20"
    )  # and what fields are at their defaults
    assert problem.endswith("at most 102400: read large settings from a file or volume")


def test_all_problems_are_reported_at_once_in_the_order_of_the_lines() -> None:
    text = JOB.replace("DataParallel", "X") + "  worker: {replicas: 0}\n---\n" + JOB.replace("digits", "DIGITS")
    assert [problem.split(": ")[0] for problem in problems(text)] == ["job.yaml:7", "job.yaml:10", "job.yaml:15"]


def test_two_documents_of_one_name_are_reported() -> None:
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
    (document,) = loaded(JOB)
    text = json.dumps(document.value, indent="\t")
    assert read("job.json", text).jobs[0].job == read("job.yaml", JOB).jobs[0].job
    assert problems(text.replace("DataParallel", "X"))[0].startswith("job.yaml:9: spec.strategy.type: ")
    (fault,) = faults("a:\n\tb: 1\n")
    assert "cannot start any token: a tab may not indent, use blanks" in fault


def test_characters_that_json_escapes_in_two_halves_are_one() -> None:
    text = "a \U0001f600 and \u00fc"
    assert loaded(json.dumps({"a": text}))[0].value == {"a": text}
    assert faults('{"a": "\\ud83d"}') == ["1: half of a surrogate pair is no character"]


def test_lint_points_at_what_this_version_does_not_support(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        MODEL.replace("consistency: Async", "consistency: Sync")
        .replace("n: 1\n", "n: 3\n", 1)
        .replace("parameterServer: {replicas: 2}", "parameterServer: {replicas: 3}")
    )
    assert lint([str(file)]) == 2
    assert (
        f"{file}:9: spec.strategy.parameterServer.replication: strategy.parameterServer.replication above 2 "
        "is not supported by this version"
    ) in capsys.readouterr().err


def test_a_configmap_and_a_secret_are_checked_as_the_api_server_would_with_their_own_lines() -> None:
    config = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  number: 1\n"
    secret = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: b}\ndata:\n  key: pässword\n"
    before = len(JOB.splitlines())
    expected = problems(JOB + config + secret)
    assert [one.partition(" ")[0] for one in expected] == [f"job.yaml:{before + 6}:", f"job.yaml:{before + 12}:"]
    assert "data.number: must be a string" in expected[0]
    assert "data.key: must be base64; plain text belongs into stringData" in expected[1]


def test_a_file_without_a_job() -> None:
    (problem,) = problems("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n")
    assert problem.startswith(
        "job.yaml:1: holds no DistTrainJob; it needs a document with apiVersion: disttrain.dev/v1alpha1"
    )
    assert problems("")[0].startswith("job.yaml:1: holds no DistTrainJob")
    assert problems("just text\n")[0].startswith("job.yaml:1: a document must be an object")


def test_other_kinds_are_left_alone_with_a_word() -> None:
    file = read("job.yaml", JOB + "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n")
    assert [found.job.metadata.name for found in file.jobs] == ["digits"]
    (warning,) = file.warnings
    assert str(warning).startswith(
        "job.yaml:12: warning: kind: a Namespace is not checked here; checked are DistTrainJob, ConfigMap"
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"nowhere.yaml: cannot be read: No such file or directory; check the path"):
        read(str(tmp_path / "nowhere.yaml"))


def test_a_long_value_is_not_repeated_in_full() -> None:
    (problem,) = problems(JOB.replace("DataParallel", "x" * 5000))
    assert len(problem) < 500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000), ("1.0", 1), ("0.5", 0.5), ("1e-4", 0.0001), ("010", 8), ("0o10", 8), ("08", 8), ("-010", -8), ("0x10", 16),
        ("0b11", 3), ("0b2", "0b2"), ("1_000", 1000), ("1_0.5", 10.5), ("_1", "_1"), ("-3", -3), ("+5", 5), (".5", 0.5), ("1.", 1),
        ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("1.2.3", "1.2.3"), ("''", ""), ("+", "+"), ("0x", "0x"), ("=", "="),
        ("yes", True), ("y", True), ("On", True), ("off", False), ("N", False), ("yEs", "yEs"), ("~", None), ("Null", None),
        ("", None), ("1e400", "1e400"), ("9223372036854775807", 9223372036854775807), ("12345678901234567890", 12345678901234567890),
        ("!!str 5", "5"), ('!!int "5"', 5), ('!!bool "yes"', True), ("'yes'", "yes"),
    ],
)  # fmt: skip
def test_a_scalar_is_what_kubectl_takes_it_for(text: str, value: object) -> None:
    (document,) = loaded(f"a: {text}")
    assert document.value == {"a": value}
    assert type(document.value["a"]) is type(value)


@pytest.mark.parametrize(
    ("text", "key"), [("1", "1"), ("yes", "true"), ("0x10", "16"), ("1.50", "1.5"), ("1e3", "1000"), ("'010'", "010")]
)
def test_a_key_becomes_the_string_that_kubectl_makes_of_it(text: str, key: str) -> None:
    contents = load(f"{text}: x")
    assert contents.documents[0].value == {key: "x"}
    assert [fault.warning for fault in contents.faults] == ([True] if text.strip("'") != key else [])


@pytest.mark.parametrize(
    "text", [".nan", ".inf", "!!binary aGk=", "!mine 5", "!!int x", "!!set {a}", "? [a]\n: b", "? ~\n: b"]
)
def test_what_json_has_no_word_for_is_refused(text: str) -> None:
    assert faults(f"a:\n  {text}" if text.startswith("?") else f"a: {text}")


def test_anchors_and_merge_keys_work_as_in_kubectl_and_within_reason() -> None:
    (document,) = loaded("base: &b {p: 1, q: 2}\nuse: {<<: *b, q: 3}\nlate: {q: 3, <<: *b}\nagain: *b\n")
    assert document.value["use"] == {"p": 1, "q": 3}
    assert document.value["late"] == {"p": 1, "q": 2}, "what comes later wins, also a merge key"
    assert loaded("a: {<<: [{p: 1}, {p: 2, q: 3}]}")[0].value == {"a": {"p": 1, "q": 3}}
    assert faults("a: {<<: 5}") == ["1: the merge key << takes an object, or a list of objects"]
    assert "nested" in faults("[" * 5000)[0]
    assert "nested" in faults("a: &a [*a]")[0]
    assert faults("a: &a {<<: *a}")


def test_every_key_that_is_given_twice_is_said_with_both_lines() -> None:
    assert faults("a: 1\nb: {c: 1,\n  c: 2}\na: 3\n") == [
        "3: key 'c' is given twice, first in line 2",
        "4: key 'a' is given twice, first in line 1",
    ]
    assert faults("1: x\n'1': y\n") == ["2: key '1' is given twice, first in line 1"]


@pytest.mark.parametrize(
    "text",
    [
        "---\n---\n# nothing\n" + JOB + "---\n\n---\n",
        "null\n---\n" + JOB,
        "--- # a comment\n" + JOB + "...\n",
        "\ufeff" + JOB,
        JOB.replace("\n", "\r\n"),
        JOB.replace("type: Data", "type:\tData").replace("trainer:\n", "trainer:\t\n"),
        json.dumps(load(JOB).documents[0].value),
        "# as JSON\n" + json.dumps(load(JOB).documents[0].value, indent=1),
        json.dumps({"apiVersion": "v1", "kind": "List", "items": [load(JOB).documents[0].value], "metadata": {}}),
    ],
)
def test_a_text_that_kubectl_reads_is_read(text: str) -> None:
    assert read("job.yaml", text).jobs[0].job == read("job.yaml", JOB).jobs[0].job


def test_files_in_utf_16_are_read_and_others_are_named(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(JOB.encode("utf-16"))
    assert read(str(file)).jobs[0].job == read("job.yaml", JOB).jobs[0].job
    file.write_bytes(JOB.replace("mine", "m\u00fc").encode("latin-1"))
    with pytest.raises(WrongInput, match=r"job.yaml:9: is not UTF-8 text: invalid start byte; save it as UTF-8"):
        read(str(file))


def test_json_objects_may_follow_one_another_and_keep_their_lines() -> None:
    one = json.dumps(load(JOB).documents[0].value, indent=1)
    two = one.replace("digits", "letters").replace("DataParallel", "X")
    (problem,) = problems(one + "\n" + two)
    assert problem.startswith(f"job.yaml:{len(one.splitlines()) + 9}: spec.strategy.type: ")
    assert problems(one + " xx") == [
        "job.yaml:19: a document must be an object with apiVersion, kind, metadata and spec"
    ]


def test_a_document_with_a_fault_hides_none_of_the_others() -> None:
    expected = problems("a: [\n---\n" + JOB.replace("DataParallel", "X") + "---\n\ta: 1\n---\n%YAML 1.2\n---\nb: {\n")
    assert [one.split(" ")[0] for one in expected] == [
        "job.yaml:2:",
        "job.yaml:9:",
        "job.yaml:13:",
        "job.yaml:15:",
        "job.yaml:18:",
    ]
    assert "kubectl takes no line that begins with %" in expected[3]
    assert problems("--- {}\n---\n" + JOB)[0].startswith("job.yaml:1: '--- {}' separates no documents for kubectl")


def test_what_kubectl_ignores_after_the_end_of_a_document_is_said() -> None:
    (warning,) = read("job.yaml", JOB + "...\n\nmore: 1\n").warnings
    assert str(warning).startswith("job.yaml:12: warning: kubectl ignores what stands here")


def indented(text: str) -> str:
    first, *rest = text.splitlines(keepends=True)
    return "- " + first + "".join("  " + line for line in rest)


LIST = "apiVersion: v1\nkind: List\nitems:\n"
CONFIG = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {k: v}\n"


def test_the_items_of_a_list_are_objects_of_their_own_with_their_lines() -> None:
    file = read("job.yaml", LIST + indented(CONFIG) + indented(JOB))
    assert [found.job.metadata.name for found in file.jobs] == ["digits"]
    assert [document["metadata"]["name"] for document in file.documents] == ["a"]
    expected = problems(LIST + indented(CONFIG.replace("k: v", "k: 1")) + indented(JOB.replace("DataParallel", "X")))
    assert expected[0].startswith("job.yaml:7: data.k: must be a string")
    assert expected[1].startswith("job.yaml:14: spec.strategy.type: ")


def test_a_list_of_jobs_may_leave_their_kind_out() -> None:
    item = indented(JOB.split("\n", 2)[2])
    file = read("job.yaml", "apiVersion: disttrain.dev/v1alpha1\nkind: DistTrainJobList\nitems:\n" + item)
    assert file.jobs[0].job == read("job.yaml", JOB).jobs[0].job


def test_mistakes_of_a_list_are_said() -> None:
    nested = "job.yaml:4: items[0]: kubectl takes no List within a List; put its objects into the outer one"
    assert problems(LIST + indented(LIST + indented(JOB))) == [nested]
    assert problems(LIST + indented(JOB) + "- null\n- 5\n") == [
        "job.yaml:13: items[1]: must be an object with apiVersion, kind and metadata (got null)",
        "job.yaml:14: items[2]: must be an object with apiVersion, kind and metadata (got 5)",
    ]
    assert problems("apiVersion: v1\nkind: List\n") == ["job.yaml:1: items: a List needs a list of objects"]
    assert problems("apiVersion: v2\nkind: List\nitems: []\n") == ['job.yaml:1: apiVersion: a List is of v1 (got "v2")']
    assert problems("kind: List\nitems: []\n") == ["job.yaml:1: apiVersion: is required; it is v1"]
    assert problems(CONFIG + "items: []\n" + "---\n" + JOB)[0] == "job.yaml:5: items: only a List has items"
    assert problems(LIST.replace("items:", "items: []"))[0].startswith("job.yaml:1: holds no DistTrainJob")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", ["1: apiVersion: is required", "1: kind: is required", "1: metadata: an object is required, with at least a name"]),
        (JOB.replace("kind: DistTrainJob\n", ""), ["1: kind: is required; it is DistTrainJob"]),
        (CONFIG.replace("apiVersion: v1\n", ""), ["1: apiVersion: is required"]),
        (JOB.replace("disttrain.dev/v1alpha1", "5"), [
            "1: apiVersion: must be a string; it is disttrain.dev/v1alpha1 (got 5)"]),
        (CONFIG.replace("ConfigMap", "5"), ["2: kind: must be a string (got 5)"]),
        (CONFIG.replace("v1", "a/b/c"), ['1: apiVersion: must be group/version, or v1 (got "a/b/c")']),
        (CONFIG.replace("v1", "v2"), ["1: apiVersion: must be v1"]),
        (CONFIG.replace("ConfigMap", "Foo"), ['2: kind: unknown kind "Foo": v1 has no such kind']),
        (CONFIG.replace("ConfigMap", "configmap"), ['2: kind: unknown kind "configmap"; did you mean "ConfigMap"?']),
        (JOB.replace("DistTrainJob", "DistTrainJobs"), ['2: kind: unknown kind "DistTrainJobs"; did you mean "DistTrainJob"?']),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a.b}\n", ["3: metadata.name: must be at most 63 lower-case letters"]),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: 1a}\n", ["3: metadata.name: must be at most 63 lower-case letters"]),
        (CONFIG + "datas: {}\nimmutable: 'yes'\n", [
            '5: datas: unknown field; did you mean "data"?', "6: immutable: must be true or false"]),
        (CONFIG + "binaryData: {k: aGk=}\n", ["1: the key k is in data and in binaryData"]),
        (CONFIG.replace("k: v", "k: " + "x" * 1_100_000), [
            "1: holds 1100000 bytes, and the API server takes 1048576; keep more than that on a claim"]),
        ("apiVersion: v1\nkind: Secret\nmetadata: {name: a}\ntype: kubernetes.io/tls\n", [
            "1: a Secret of type kubernetes.io/tls needs the key tls.crt and tls.key"]),
        ("apiVersion: v1\nkind: Secret\nmetadata: {name: a}\nstringData: {k: 5}\ntype: 5\n", [
            "4: stringData.k: must be a string; put it into quotes", "5: type: must be a string"]),
        ("apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: a}\n", ["1: spec: is required"]),
        ("apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: a}\nspec: {accessModes: [RWO], resources: {request: {}}}\n", [
            "4: spec.accessModes[0]: Input should be", '4: spec.resources.request: unknown field; did you mean "requests"?',
            "4: spec.resources.requests: is required"]),
    ],
)  # fmt: skip
def test_mistakes_of_any_object_are_said_all_at_once(text: str, expected: list[str]) -> None:
    found = problems(text)
    assert len(found) == len(expected), found
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(f"job.yaml:{start}"), problem


def test_kinds_that_only_a_cluster_can_judge_are_left_alone_with_a_word() -> None:
    for other in ("apiVersion: secrets.example.com/v1\nkind: Secret\nmetadata: {name: a}\nspec: {}\n",
                  "apiVersion: v1\nkind: PersistentVolume\nmetadata: {name: a}\nspec: {}\n",
                  "apiVersion: extensions/v1beta1\nkind: Deployment\nmetadata: {name: a}\nspec: {}\n"):  # fmt: skip
        file = read("job.yaml", JOB + "---\n" + other)
        assert len(file.warnings) == 1
        assert not file.documents


METADATA = [
    ("labels: {a: 1, b: true, c: }", ["labels.a: must be a string; put it into quotes (got 1)",
                                      "labels.b: must be a string; put it into quotes (got true)"]),
    ("labels: [a]", ['labels: must be an object (got ["a"])']),
    ('labels: {"a b": x, a: "x y"}', ["labels.a b: 'a b' cannot name a label: ", "labels.a: a label's value must have "]),
    ('labels: {A.com/x: v, /x: v, a/b/c: v}', ["labels./x: ", "labels.A.com/x: ", "labels.a/b/c: "]),
    ("labels: {a: " + 64 * "x" + "}", ["labels.a: a label's value must have at most 63"]),
    ("annotations: {a: 1, b: {c: d}}", ["annotations.a: must be a string; put it into quotes (got 1)",
                                        'annotations.b: must be a string; put it into quotes (got {"c": "d"})']),
    ('annotations: {"a b": x}', ["annotations.a b: 'a b' cannot name an annotation"]),
    ("annotations: {a: " + 262_200 * "x" + "}", ["annotations: keys and values have 262201 bytes; at most 262144"]),
    ("namespace: Bad_NS", ['namespace: must be a namespace\'s name: at most 63 lower-case letters, digits and \'-\' (got "Bad_NS")']),
    ("namespace: 5", ["namespace: must be a string; put it into quotes (got 5)"]),
    ("uid: 5", ["uid: must be a string"]),
    ("generation: '5'", ['generation: must be a whole number (got "5")']),
    ("creationTimestamp: foo", ["creationTimestamp: must be a time such as"]),
    ("creationTimestamp: 2024-01-01", ["creationTimestamp: must be a time such as"]),
    ("label: {a: b}", ['label: unknown field; did you mean "labels"?']),
    ("foo: 1", ["foo: unknown field"]),
    ("finalizers: [a b, 1, example.com/x]", ["finalizers[0]: ", "finalizers[1]: must be a string"]),
    ("finalizers: [foregroundDeletion, orphan]", ["finalizers: foregroundDeletion and orphan exclude"]),
    ("ownerReferences: [{apiVersion: v1, kind: ConfigMap, foo: 1}]", [
        "ownerReferences[0].foo: unknown field", "ownerReferences[0].name: is required", "ownerReferences[0].uid: is required"]),
    ("ownerReferences: foo", ['ownerReferences: must be a list (got "foo")']),
    ("ownerReferences: [{apiVersion: v1, kind: Event, name: a, uid: b, controller: 'true'}]", [
        'ownerReferences[0].controller: must be true or false (got "true")', "ownerReferences[0].kind: an Event cannot"]),
    ("generateName: Bad_", ["generateName: must be a lower-case DNS name"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), METADATA, ids=[line[:40] for line, _ in METADATA])
def test_mistakes_of_metadata_are_said_with_those_of_the_spec(line: str, expected: list[str]) -> None:
    text = JOB.replace("  name: digits\n", f"  name: digits\n  {line}\n").replace("DataParallel", "X")
    *found, spec = problems(text)
    assert spec.startswith("job.yaml:8: spec.strategy.type")
    assert len(found) == len(expected), found
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(f"job.yaml:5: metadata.{start}"), problem


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ("name: 123", "metadata.name: must be a string; put it into quotes (got 123)"),
        ("name: yes", "metadata.name: must be a string; put it into quotes (got true)"),
        ("name:", "metadata.name: is required"),
        ('name: ""', "metadata.name: is required"),
        ('name: "123"', "metadata.name: must be an RFC 1035 label of at most 40 characters"),
        ("name: a.b", "metadata.name: must be an RFC 1035 label of at most 40 characters"),
    ],
)
def test_a_wrong_name_is_said_with_the_mistakes_of_the_spec(old: str, expected: str) -> None:
    name, spec = problems(JOB.replace("name: digits", old).replace("DataParallel", "X"))
    assert name.startswith(f"job.yaml:4: {expected}")
    assert spec.startswith("job.yaml:7: spec.strategy.type")


def test_a_job_as_kubectl_shows_it_is_read_and_what_the_api_server_had_set_is_left_out() -> None:
    shown = JOB.replace(
        "  name: digits\n",
        "  name: digits\n  namespace: default\n  uid: x\n  resourceVersion: '5'\n  generation: 3\n"
        "  creationTimestamp: 2024-01-01T00:00:00Z\n  deletionTimestamp: null\n  managedFields: [{manager: kubectl}]\n"
        "  annotations: {a: null}\n  finalizers: [disttrain]\n",
    )
    (found,) = read("job.yaml", shown + "status: {state: Complete, anything: 5}\n").jobs
    assert (found.job.metadata.uid, found.job.metadata.generation, found.job.status.state) == ("", 1, None)
    assert found.job.metadata.annotations == {"a": ""}


def test_a_folder_is_read_as_kubectl_reads_it(tmp_path: Path) -> None:
    for name, text in (("b.yml", JOB), ("a.yaml", CONFIG), ("c.json", "5"), ("notes.txt", "{"), ("in/x.yaml", "{")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(WrongInput, match=r"c.json:1: a document must be an object"):
        read(str(tmp_path))
    (tmp_path / "c.json").unlink()
    file = read(str(tmp_path))
    assert [found.file for found in file.jobs] == [str(tmp_path / "b.yml")]
    (tmp_path / "z.yaml").write_text(JOB)
    with pytest.raises(WrongInput, match=rf"z.yaml:4: DistTrainJob digits is already in {tmp_path}/b.yml:1"):
        read(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WrongInput, match=r"the folder holds no file that ends with \.json, \.yaml, \.yml"):
        read(str(tmp_path / "empty"))


def test_a_url_is_read_and_its_failure_is_named(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert len(read(f"{address}/job.yaml").jobs) == 1
        with pytest.raises(WrongInput, match="cannot be read: the server answers 404"):
            read(f"{address}/none.yaml")
        server.shutdown()
    with pytest.raises(WrongInput, match="cannot be read: Connection refused"):
        read(f"{address}/job.yaml")


def test_lint_reads_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(JOB.replace("DataParallel", "X").encode())))
    assert lint(["-"]) == 2
    assert "-:7: spec.strategy.type: " in capsys.readouterr().err


def test_a_job_finds_the_objects_of_its_own_namespace_beside_it() -> None:
    def config(name: str, namespace: str) -> str:
        return f"---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: {namespace}}}\n"

    file = read(
        "job.yaml", JOB + config("a", "default") + config("a", "other") + config("b", "''") + config("c", "other")
    )
    found = [
        (document["metadata"]["name"], document["metadata"]["namespace"]) for document in file.beside(file.jobs[0])
    ]
    assert found == [("a", "default"), ("b", "")]
