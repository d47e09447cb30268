"""The repository keeps clear of the traps that its own names set."""

import operator
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("folder", ["operator", "trainer_image"])
def test_package_roots_hold_nothing_that_would_shadow_the_standard_library(folder: str) -> None:
    strays = [p for pattern in ("__init__.py", "conftest.py") for p in (ROOT / folder).glob(pattern)]
    tests = [p for pattern in ("test_*.py", "*_test.py") for p in (ROOT / folder).rglob(pattern)]
    assert strays + tests == []


def test_operator_is_the_standard_librarys() -> None:
    assert operator.__file__ is not None
    assert Path(operator.__file__).parent == Path(sysconfig.get_path("stdlib"))


@pytest.mark.parametrize("module", ["disttrain.controller.process", "disttrain.cli.main", "disttrain_trainer.session"])
def test_importing_it_leaves_torch_out(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_file_names_a_package_index_or_a_machine_path() -> None:
    words = [
        "pypi" + ".org",
        "files.python" + "hosted",
        "proxy." + "golang",
        "registry." + "npmjs",
        "deb." + "debian.org",
        "/work" + "/",
        "../" + "shared",
    ]
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = [
        (name, word)
        for name in files.stdout.splitlines()
        if (path := ROOT / name).is_file()
        for word in words
        if word in path.read_text(errors="ignore")
    ]
    assert found == []
