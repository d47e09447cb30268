"""Nothing in the trainer unpickles: what a peer, a checkpoint or a data set holds never becomes code.

But for the loader processes of trainer.loaderWorkers: a process that was forked from this one sends it batches, through a pipe that only
the two have, and both run the user's code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TRAINER = Path(__file__).parents[3] / "trainer_image"
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def unpickling(source: str) -> Iterator[str]:
    """What in a module would, or could, unpickle something."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (
                    f"{node.lineno}: import {name.name}" for name in names if name.name.partition(".")[0] in PICKLES
                )
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in PICKLES:
                yield f"{node.lineno}: from {module}"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                safe = any(
                    k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value for k in keywords
                )
                if not safe:
                    yield f"{node.lineno}: torch.load without weights_only=True"
            case ast.Call(func=ast.Attribute(attr="load"), keywords=keywords) if any(
                k.arg == "allow_pickle" for k in keywords
            ):
                yield f"{node.lineno}: allow_pickle"
            case ast.ImportFrom(module="multiprocessing.reduction"):
                yield f"{node.lineno}: from multiprocessing.reduction"
            case ast.Attribute(attr=name) | ast.Name(id=name) if name.endswith(("_object", "object_list")):
                # torch.distributed's object collectives pickle on one side and unpickle on the other.
                yield f"{node.lineno}: {name}"


FORKED = {"loader_processes.py", "loader_failure.py"}


@pytest.mark.parametrize(
    "file",
    sorted(file for file in TRAINER.rglob("*.py") if file.name not in FORKED),
    ids=lambda file: str(file.relative_to(TRAINER)),
)
def test_nothing_unpickles(file: Path) -> None:
    assert list(unpickling(file.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from multiprocessing.reduction import ForkingPickler",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "dist.all_gather_object(found, mine)",
        "dist.broadcast_object_list(objects)",
        "from torch.distributed import scatter_object_list\nscatter_object_list(x)",
    ],
)
def test_this_test_would_see_it(source: str) -> None:
    assert list(unpickling(source))


def test_what_is_safe_is_left_alone() -> None:
    assert list(unpickling("torch.load(path, weights_only=True); json.load(file); self.object = 1")) == []
