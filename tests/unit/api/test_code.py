"""What the code of a job may hold, and how the ConfigMap of a script of earlier releases is read."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from disttrain.api import JobConfig
from disttrain.api.code import escapes, files_of, module_path, of_older_release, problems, with_code
from disttrain.api.job import DistTrainJob
from disttrain.api.stored import read_stored
from disttrain.manifests.pod import build_pod
from unit.plan.builders import WORKER, make_job


def archive(*members: str) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        for member in members:
            written.writestr(member, "")
    return file


def said(files: Mapping[str, Any], *, only_code: bool = True) -> list[str]:
    return list(problems(files, only_code=only_code))


NOTHING = io.BytesIO()


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("random.py", "Python"),
        ("email/__init__.py", "Python"),
        ("disttrain_trainer.py", "DistTrain"),
        ("torch.py", "a package that the trainer needs"),
        ("numpy/__init__.py", "a package that the trainer needs"),
    ],
)
def test_a_module_that_hides_another_is_named(name: str, owner: str) -> None:
    expected = f"has the name of a module of {owner}, which it would replace: rename it"
    assert said({name: NOTHING}) == [f"{name} {expected}"]
    assert said({"lib.zip": archive("mine.py", name)}) == [f"{name} in lib.zip {expected}"]


@pytest.mark.parametrize("name", ["random.pyc", "json/__init__.pyc", "torch.cpython-311-x86_64-linux-gnu.so"])
def test_a_compiled_module_hides_another_as_well(name: str) -> None:
    assert "which it would replace: rename it" in said({"lib.zip": archive(name)})[0]
    assert "which it would replace: rename it" in said({name: NOTHING}, only_code=False)[0]


@pytest.mark.parametrize(
    "name", ["mine.py", "my-train.py", "mine/random.py", "random/mine.py", "utils/__init__.py", "lib.zip"]
)
def test_a_module_of_the_user_is_none_of_ours(name: str) -> None:
    assert said({name: archive("mine/__init__.py")}) == []


def test_a_config_map_holds_modules_and_archives_alone() -> None:
    notes = "notes.txt is neither a .py file nor a .zip archive: remove it, or keep it on a volume"
    assert said({"notes.txt": NOTHING, "mine.py": NOTHING}) == [notes]
    assert said({"notes.txt": NOTHING}, only_code=False) == [], "a folder of a claim may hold anything"


def test_an_archive_is_one() -> None:
    (problem,) = said({"lib.zip": io.BytesIO(b"text")})
    assert problem.startswith("lib.zip cannot be read as a zip archive: ")


@pytest.mark.parametrize("path", ["/src", "../src", "src/..", "a/../b", ".", "./a", "a//b", "a/"])
def test_a_path_that_leaves_the_claim_escapes(path: str) -> None:
    assert escapes(path)
    assert not escapes("team-1/src/v1.2/..hidden")


def test_files_of_a_folder_are_those_that_can_be_imported_and_what_lies_at_its_top(tmp_path: Path) -> None:
    for name in ("a.py", "notes.txt", "b.zip", "c.zip", "pkg/m.py", "pkg/data.csv", ".git/x.py", "__pycache__/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(files_of(tmp_path)) == ["a.py", "b.zip", "c.zip", "notes.txt", "pkg/m.py"]
    assert module_path(tmp_path) == [str(tmp_path), str(tmp_path / "b.zip"), str(tmp_path / "c.zip")]


@pytest.mark.parametrize(
    ("before", "after"), [(None, ""), ("", ""), ("/a::/b", ":/a::/b"), ("/a:{folder}:/b", ":/a:/b"), (":/a", "::/a")]
)
def test_code_stands_in_front_of_python_path_and_once(tmp_path: Path, before: str | None, after: str) -> None:
    found = with_code(tmp_path, before and before.format(folder=tmp_path))
    assert found == f"{tmp_path}{after}"


def test_a_config_map_is_mounted_as_kubernetes_does_it(tmp_path: Path) -> None:
    (tmp_path / "..2026_11").mkdir()
    (tmp_path / "..2026_11/train.py").touch()
    (tmp_path / "..data").symlink_to("..2026_11")
    (tmp_path / "train.py").symlink_to("..data/train.py")
    assert list(files_of(tmp_path)) == ["train.py"]


def test_a_stored_script_of_a_config_map_is_read_as_code_and_finds_its_file() -> None:
    body = make_job().script().body
    body["spec"]["trainer"]["script"]["configMap"] = "my-code"
    read = read_stored(body)
    assert (read.not_understood, read.unknown) == ((), ())
    assert read.job.spec.trainer.code is not None
    assert read.job.spec.trainer.code.config_map == "my-code"
    pod = build_pod(read.job, WORKER, 0, 1, trainer_image="t:1")
    assert {"name": "disttrain-code", "configMap": {"name": "my-code"}} in pod["spec"]["volumes"]
    (config,) = (v["value"] for v in pod["spec"]["containers"][0]["env"] if v["name"] == "DISTTRAIN_JOB")
    script = JobConfig.decode(config)[0].trainer.script
    assert script is not None
    assert script.file == "/disttrain/code/train.py", "which a trainer of an earlier release finds, too"


def test_new_input_with_the_config_map_of_a_script_is_refused() -> None:
    body = make_job().script().body
    body["spec"]["trainer"]["script"]["configMap"] = "my-code"
    with pytest.raises(ValueError, match=r"configMap: write trainer\.code\.configMap \(got my-code\)"):
        DistTrainJob.parse(body)


@pytest.mark.parametrize(
    "trainer", [None, 7, {}, {"script": None}, {"script": {"file": "a.py"}}, {"command": ["true"]}]
)
def test_any_other_trainer_is_read_as_it_is(trainer: Any) -> None:
    assert of_older_release(trainer) is trainer
