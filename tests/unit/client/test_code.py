"""The ConfigMap of a folder's code: what is in it, and what cannot be."""

from __future__ import annotations

import base64
import io
import sys
import zipfile
from pathlib import Path

import pytest

from disttrain.client.code import NotUsable, config_map


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text("SIZE = 3\n")
    (tmp_path / "README.md").write_text("no code")
    (tmp_path / ".hidden.py").write_text("")
    return tmp_path


def test_modules_are_keys_of_an_immutable_config_map_that_is_named_by_its_digest(folder: Path) -> None:
    body = config_map(folder, "digits")
    assert (body["data"], body["immutable"]) == ({"mine.py": "SIZE = 3\n"}, True)
    name = body["metadata"]["name"]
    assert name.startswith("digits-code-")
    assert config_map(folder, "digits")["metadata"]["name"] == name
    (folder / "mine.py").write_text("SIZE = 4\n")
    assert config_map(folder, "digits")["metadata"]["name"] != name


def test_packages_are_in_an_archive_from_which_they_are_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = folder / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("from package_of_mine.net import WIDTH\n")
    (package / "net.py").write_text("WIDTH = 7\n")
    body = config_map(folder, "digits")
    archive = base64.b64decode(body["binaryData"]["packages.zip"])
    assert zipfile.ZipFile(io.BytesIO(archive)).namelist() == ["package_of_mine/__init__.py", "package_of_mine/net.py"]
    assert config_map(folder, "digits") == body
    (tmp_path / "mounted.zip").write_bytes(archive)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "mounted.zip"), *sys.path])
    import package_of_mine

    assert package_of_mine.WIDTH == 7
    assert "mounted.zip" in package_of_mine.__file__


def test_a_module_in_another_encoding_is_kept_byte_by_byte(folder: Path) -> None:
    (folder / "old.py").write_bytes(b"# coding: latin-1\nNAME = '\xe9'\n")
    assert base64.b64decode(config_map(folder, "digits")["binaryData"]["old.py"]).endswith(b"'\xe9'\n")


def test_all_that_is_wrong_is_said_at_once(folder: Path) -> None:
    for name in ("random.py", "torch.py", "my module.py"):
        (folder / name).write_text("")
    with pytest.raises(NotUsable) as error:
        config_map(folder, "digits")
    assert [problem.partition(" has the name of ")[0] for problem in error.value.problems[:2]] == [
        "random.py",
        "torch.py",
    ]
    assert error.value.problems[2].startswith("my module.py is no key")


def test_code_that_no_config_map_holds_is_refused_with_the_largest_part_of_it(folder: Path) -> None:
    (folder / "venv").mkdir()
    (folder / "venv" / "large.py").write_bytes(bytes(range(256)) * 64)
    (folder / "table.py").write_text("x" * (1 << 20))
    with pytest.raises(NotUsable, match=r"the code has 1\.0 MiB, most of it in table\.py, and a ConfigMap holds 1 MiB"):
        config_map(folder, "digits")
    with open(folder / "venv" / "large.py", "wb") as file:
        file.truncate(40 << 20)
    with pytest.raises(NotUsable, match=r"the code has 41\.0 MiB, most of it in venv"):
        config_map(folder, "digits")


def test_a_folder_without_code_is_refused(folder: Path) -> None:
    (folder / "mine.py").unlink()
    for place, text in ((folder, r"holds no \.py file"), (folder / "none", "is no folder")):
        with pytest.raises(NotUsable, match=text):
            config_map(place, "digits")
