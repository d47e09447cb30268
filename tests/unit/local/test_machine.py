"""What a machine has: GPUs by the names that CUDA knows, and packages that a process would find."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from disttrain.local import machine


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("0,1", ["0", "1"]),
        ("3, 5", ["3", "5"]),
        ("GPU-8932f937,MIG-1", ["GPU-8932f937", "MIG-1"]),
        ("", []),
        ("-1", []),
        ("0,-1,2", ["0"]),
        ("none", []),
    ],
)
def test_gpus_are_those_that_cuda_would_show(visible: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpus() == names


def test_gpus_are_counted_and_not_named_by_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    files = [Path("/dev") / name for name in ("nvidia2", "nvidia5", "nvidiactl", "nvidia-uvm")]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(files))
    assert machine.gpus() == ["0", "1"]


def test_a_module_of_the_current_folder_is_found_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not machine.importable("module_of_this_folder")
    (tmp_path / "module_of_this_folder.py").write_text("raise SystemExit('imported')")
    before = sys.path[:]
    assert machine.importable("module_of_this_folder")
    assert "module_of_this_folder" not in sys.modules
    assert sys.path == before


def test_a_package_of_an_editable_install_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """setuptools installs a flat layout by a finder of its own, which no path shows."""

    class Finder:
        @classmethod
        def find_spec(
            cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> importlib.machinery.ModuleSpec | None:
            return importlib.machinery.ModuleSpec(name, None) if name == "mynets_editable" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert machine.importable("mynets_editable")
    assert not machine.importable("mynets_elsewhere")
